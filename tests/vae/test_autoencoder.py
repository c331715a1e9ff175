"""The codec: sizes, parameter paths, causality, streaming, batches, target rates."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.vae import autoencoder

CONFIG = AudioVAEConfig(
    encoder_dim=4, encoder_rates=(2, 5), latent_dim=6, decoder_dim=12, decoder_rates=(3, 5, 2), sample_rate=16000,
    out_sample_rate=48000, sr_bin_boundaries=(20000, 30000, 40000),
)  # fmt: skip
FRAMES = 7

encode = jax.jit(autoencoder.encode, static_argnums=1)
decode = jax.jit(autoencoder.decode, static_argnums=1)
encode_step = jax.jit(autoencoder.encode_step, static_argnums=1)
decode_step = jax.jit(autoencoder.decode_step, static_argnums=1)


@pytest.fixture(scope="module")
def params():
    """Away from the initial values, so that target rates differ."""
    leaves, tree = jax.tree.flatten(jax.jit(autoencoder.init, static_argnums=1)(jax.random.key(0), CONFIG))
    draw = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [p + 0.2 * draw.normal(size=p.shape).astype(np.float32) for p in leaves])


@pytest.fixture(scope="module")
def latents_BTC():
    return np.random.default_rng(1).normal(size=(2, FRAMES, CONFIG.latent_dim)).astype(np.float32)


def _paths(config):
    shapes = jax.eval_shape(lambda key: autoencoder.init(key, config), jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


def test_the_released_shape_has_its_parameters():
    paths = _paths(AudioVAEConfig())
    assert len(paths) == 311  # 312 tensors, one of them the boundaries
    assert sum(int(np.prod(shape)) for shape in paths.values()) == 94_213_954
    assert paths["encoder/block_3/down/kernel"] == (16, 1024, 2048)
    assert paths["decoder/block_0/up/kernel"] == (16, 2048, 1024)
    assert paths["decoder/block_0/up/gain"] == (2048,)
    assert paths["decoder/block_5/unit_2/conv_in/kernel"] == (7, 1, 32)


def test_parameter_paths_are_what_the_docstring_promises():
    promised = (
        r"(encoder|decoder)/conv_in|decoder/proj|encoder/(mu|logvar)|decoder/conv_out|(encoder|decoder)/block_\d/(down|up)"
        r"|(encoder|decoder)/block_\d/unit_[012]/conv_(in|out)"
    )
    snakes = r"decoder/snake|(encoder|decoder)/block_\d/(snake|unit_[012]/snake_(in|out))"
    pattern = rf"({promised})/(kernel|gain|bias)|({snakes})/alpha|decoder/block_\d/rate/(scale|bias)"
    assert all(re.fullmatch(pattern, path) for path in _paths(CONFIG))
    plain = dataclasses.replace(CONFIG, depthwise=False, sr_bin_boundaries=None)
    assert not any("proj" in path or "rate" in path for path in _paths(plain))


def test_encode_pads_right_to_whole_hops(params):
    audio_BA = np.random.default_rng(2).normal(size=(2, 43)).astype(np.float32)
    latents = encode(params, CONFIG, audio_BA)
    assert latents.shape == (2, 5, CONFIG.latent_dim)
    np.testing.assert_array_equal(latents, encode(params, CONFIG, np.pad(audio_BA, ((0, 0), (0, 7)))))


def test_decode_gives_whole_hops_within_one(params, latents_BTC):
    audio_BA = decode(params, CONFIG, latents_BTC)
    assert audio_BA.shape == (2, FRAMES * CONFIG.decoder_hop) and audio_BA.dtype == jnp.float32
    assert 0.01 < abs(audio_BA).max() < 1


def test_codec_is_causal_frame_by_frame(params, latents_BTC):
    changed = latents_BTC.copy()
    changed[:, 4:] += 1
    differs_A = np.abs(decode(params, CONFIG, changed) - decode(params, CONFIG, latents_BTC)).max(0) > 1e-6
    assert not differs_A[: 4 * CONFIG.decoder_hop].any() and differs_A[4 * CONFIG.decoder_hop :].any()
    audio_BA = np.random.default_rng(3).normal(size=(1, 70)).astype(np.float32)
    late = audio_BA.copy()
    late[:, 40:] += 1
    differs_T = np.abs(encode(params, CONFIG, late) - encode(params, CONFIG, audio_BA)).max((0, 2)) > 1e-6
    assert not differs_T[:4].any() and differs_T[4:].any()


chunkings = given(st.lists(st.integers(1, 2), min_size=1, max_size=FRAMES))


def bounds_of(sizes):
    """Start and end of chunks of these sizes, then of single frames."""
    ends = np.minimum(np.cumsum([*sizes, *[1] * FRAMES]), FRAMES)
    return [(start, end) for start, end in zip([0, *ends], ends) if start < end]


@settings(max_examples=12, deadline=None)
@chunkings
def test_streaming_equals_offline_for_every_chunking(params, latents_BTC, sizes):
    state = autoencoder.decode_state(CONFIG, 2)
    parts = []
    for start, end in bounds_of(sizes):
        audio_BA, state = decode_step(params, CONFIG, latents_BTC[:, start:end], state, 24000)
        parts.append(audio_BA)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), decode(params, CONFIG, latents_BTC, 24000), atol=2e-5)


@settings(max_examples=12, deadline=None)
@chunkings
def test_streaming_encoder_equals_offline_for_every_chunking(params, sizes):
    hop = CONFIG.encoder_hop
    audio_BA = np.random.default_rng(4).normal(size=(2, FRAMES * hop)).astype(np.float32)
    state = autoencoder.encode_state(CONFIG, 2)
    parts = []
    for start, end in bounds_of(sizes):
        latents_BTC, state = encode_step(params, CONFIG, audio_BA[:, start * hop : end * hop], state)
        parts.append(latents_BTC)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), encode(params, CONFIG, audio_BA), rtol=1e-4, atol=2e-5)


def test_batched_equals_single(params, latents_BTC):
    both = decode(params, CONFIG, latents_BTC)
    for i in range(2):
        np.testing.assert_allclose(decode(params, CONFIG, latents_BTC[i : i + 1])[0], both[i], atol=2e-5)


def test_trap_12_a_rate_equal_to_a_boundary_is_in_the_lower_bucket(params, latents_BTC):
    def at(hz):
        return np.asarray(decode(params, CONFIG, latents_BTC[:1], hz))

    np.testing.assert_array_equal(at(20000), at(8000))
    np.testing.assert_array_equal(at(20001), at(30000))
    np.testing.assert_array_equal(at(40000), at(30001))
    np.testing.assert_array_equal(at(48000), at(40001))
    assert all(np.abs(at(a) - at(b)).max() > 1e-3 for a, b in ((20000, 20001), (30000, 30001), (40000, 40001)))


def test_a_rate_per_row_conditions_its_row(params, latents_BTC):
    mixed = decode(params, CONFIG, latents_BTC, jnp.array([16000, 48000]))
    np.testing.assert_allclose(mixed[0], decode(params, CONFIG, latents_BTC, 16000)[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], decode(params, CONFIG, latents_BTC, 48000)[1], atol=1e-6)


def test_trap_14_encoder_and_decoder_rates_are_two(params):
    """16 kHz in, 48 kHz out: a second is a second on both sides, and swapped rates do not make a codec."""
    audio_BA = np.zeros((1, 160), np.float32)
    latents = encode(params, CONFIG, audio_BA)
    assert decode(params, CONFIG, latents).shape[1] == 3 * 160
    with pytest.raises(ValueError, match="sample rates and strides must agree"):
        dataclasses.replace(CONFIG, sample_rate=48000, out_sample_rate=16000)


def test_computation_is_float32_whatever_the_parameters_are(params, latents_BTC):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    back = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    np.testing.assert_array_equal(decode(half, CONFIG, latents_BTC), decode(back, CONFIG, latents_BTC))


def test_remat_changes_no_gradient(params, latents_BTC):
    def loss(params, use_remat):
        return jnp.sum(jnp.square(autoencoder.reconstruct(params, CONFIG, latents_BTC[:, :2], use_remat=use_remat)))

    plain, remat = (jax.jit(jax.grad(loss), static_argnums=1)(params, flag) for flag in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, remat)
