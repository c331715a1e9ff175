"""The codec against the live PyTorch package: encode, decode at all kinds of target rate, streaming; float32, 1e-5 relative."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from voxcpm.modules.audiovae import AudioVAEV2
from voxcpm.modules.audiovae.audio_vae_v2 import AudioVAEConfig as ReferenceConfig

from tests.reference.compare import close
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.torch_io import tables
from voxcpm2_jax.vae import autoencoder

SHAPES = {
    # Odd, even and unit strides; decoder widths that do not divide; conditioned on the rate.
    "depthwise": AudioVAEConfig(
        encoder_dim=6, encoder_rates=(2, 5, 1, 4), latent_dim=5, decoder_dim=36, decoder_rates=(5, 1, 4, 6),
        sample_rate=16000, out_sample_rate=48000, sr_bin_boundaries=(20000, 30000, 40000),
    ),
    "dense": AudioVAEConfig(
        encoder_dim=4, encoder_rates=(3, 2), latent_dim=7, decoder_dim=20, decoder_rates=(2, 3), depthwise=False,
        sample_rate=16000, out_sample_rate=16000, sr_bin_boundaries=None,
    ),
}  # fmt: skip
encode = jax.jit(autoencoder.encode, static_argnums=1)
posterior = jax.jit(autoencoder.posterior, static_argnums=1)
decode = jax.jit(autoencoder.decode, static_argnums=1)
decode_step = jax.jit(autoencoder.decode_step, static_argnums=1)
RATES = (8000, 20000, 20001, 24000, 40000, 48000)  # Hz


@dataclasses.dataclass(frozen=True)
class Codec:
    config: AudioVAEConfig
    params: dict
    torch_model: AudioVAEV2


def _randomise(model):
    """Every parameter away from its initial value, outputs of the order of one."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith((".bias", "bias_embed.weight")):
            tensor.copy_(0.2 * noise)
        elif name.endswith(".weight_g"):  # moderate, or the sines of layer upon layer amplify rounding
            tensor.copy_(0.5 * torch.exp(0.3 * noise))
        elif name.endswith((".alpha", "scale_embed.weight")):
            tensor.copy_(torch.exp(0.3 * noise))
        else:
            tensor.copy_(noise)


@pytest.fixture(scope="module", params=list(SHAPES))
def codec(request):
    config = SHAPES[request.param]
    fields = dataclasses.asdict(config)
    model = AudioVAEV2(ReferenceConfig.model_validate(fields)).eval()
    with torch.no_grad():
        _randomise(model)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params: dict = {}
    for row in tables.vae_table(config):
        if row.path is None:  # the boundaries: configuration
            continue
        *parents, last = row.path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = row.from_torch(tensors[row.name])
    return Codec(config, params, model)


def _latents(codec, frames, batch=2):
    return np.random.default_rng(frames).normal(size=(batch, frames, codec.config.latent_dim)).astype(np.float32)


def _their_decode(codec, latents_BTC, hz=None):
    z = torch.from_numpy(latents_BTC).transpose(1, 2)
    rate = None if hz is None else torch.tensor(np.atleast_1d(hz), dtype=torch.int32)
    with torch.no_grad():
        return codec.torch_model.decode(z, rate)[:, 0].numpy()


@pytest.mark.parametrize("remainder", [0, 1, -1])
def test_encode(codec, remainder):
    samples = 6 * codec.config.encoder_hop + remainder
    audio_BA = 0.3 * np.random.default_rng(0).normal(size=(2, samples)).astype(np.float32)
    with torch.no_grad():
        theirs = codec.torch_model.encode(torch.from_numpy(audio_BA), codec.config.sample_rate)
    close(encode(codec.params, codec.config, audio_BA), theirs.transpose(1, 2).numpy())


def test_posterior_log_variance(codec):
    audio_BA = 0.3 * np.random.default_rng(1).normal(size=(1, 4 * codec.config.encoder_hop)).astype(np.float32)
    with torch.no_grad():
        theirs = codec.torch_model.encoder(torch.from_numpy(audio_BA)[:, None])["logvar"]
    close(posterior(codec.params, codec.config, audio_BA)[1], theirs.transpose(1, 2).numpy())


def test_decode_without_a_rate(codec):
    latents_BTC = _latents(codec, 7)
    theirs = _their_decode(codec, latents_BTC)
    close(decode(codec.params, codec.config, latents_BTC, codec.config.out_sample_rate), theirs)


def test_trap_11_transposed_convolutions_trim_right_and_gains_are_per_input_channel(codec):
    """The first sample hears the first frame; the last frame's tail is cut. Gains differ per input channel."""
    gain = codec.params["decoder"]["block_0"]["up"]["gain"]
    assert gain.shape == (codec.config.decoder_dim,) and np.ptp(gain) > 0.1
    latents_BTC = _latents(codec, 3)
    ours = decode(codec.params, codec.config, latents_BTC)
    assert ours.shape == (2, 3 * codec.config.decoder_hop)
    close(ours, _their_decode(codec, latents_BTC))


def test_trap_12_a_rate_equal_to_a_boundary_is_in_the_lower_bucket(codec):
    latents_BTC = _latents(codec, 4)
    for hz in RATES:
        close(decode(codec.params, codec.config, latents_BTC, hz), _their_decode(codec, latents_BTC, hz))


def test_decode_with_a_rate_per_row(codec):
    latents_BTC = _latents(codec, 4)
    rates = np.array([20000, 48000], np.int32)
    close(decode(codec.params, codec.config, latents_BTC, rates), _their_decode(codec, latents_BTC, rates))


def test_streaming(codec):
    """Chunk by chunk as the PyTorch package streams, and as it decodes offline."""
    latents_BTC = _latents(codec, 6, batch=1)
    offline = _their_decode(codec, latents_BTC)
    theirs, ours = [], []
    state = autoencoder.decode_state(codec.config, 1)
    with codec.torch_model.streaming_decode() as decoder:
        for start, end in ((0, 2), (2, 3), (3, 5), (5, 6)):
            with torch.no_grad():
                chunk = torch.from_numpy(latents_BTC[:, start:end]).transpose(1, 2)
                theirs.append(decoder.decode_chunk(chunk)[:, 0].numpy())
            audio_BA, state = decode_step(codec.params, codec.config, latents_BTC[:, start:end], state)
            ours.append(audio_BA)
            close(ours[-1], theirs[-1])
    close(np.concatenate(ours, axis=1), offline)
