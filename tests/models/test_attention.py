"""Attention: every kernel equals XLA's, forward and gradients, and none needs memory that grows with the slots' square."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from voxcpm2_jax import sequence, sharding
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.models import attention as attn
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.models.attention import attention, find_segments
from voxcpm2_jax.models.compute import Compute

N, K, H = 4, 2, 8


def ids(*rows):
    """segment_BT from each row's segment lengths; the first may be a negative number: padding."""
    numbers = [np.repeat([0 if n < 0 else i + 1 for i, n in enumerate(row)], np.abs(row)) for row in rows]
    return np.stack(numbers).astype(np.int32)


def some_rows(B, T, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, H)), dtype) for n in (N, K, K))


def outcome(kernel, q_BTNH, k_BTKH, v_BTKH, segment_BT):
    """The output and the gradients of a sum over slots that are not padding."""
    weight_BTNH = np.random.default_rng(1).normal(size=q_BTNH.shape) * (np.asarray(segment_BT) > 0)[..., None, None]

    def total(q, k, v):
        o_BTNH = kernel(q, k, v, find_segments(segment_BT)).astype(jnp.float32)
        return jnp.sum(o_BTNH * jnp.asarray(weight_BTNH, jnp.float32)), o_BTNH

    (_, o_BTNH), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q_BTNH, k_BTKH, v_BTKH)
    return [np.asarray(o_BTNH) * (np.asarray(segment_BT) > 0)[..., None, None], *grads]


# ---- segments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "M"), [(1, 1), (24, 3), (24, 9), (24, 30)])
def test_segments_of_any_layout(T, M):
    """Three hundred layouts with padding and without; some have more segments than there is room for."""
    rng = np.random.default_rng(M)
    rows = []
    for _ in range(300):
        cuts = np.unique(rng.integers(1, T, rng.integers(0, 12))) if T > 1 else []
        lengths = np.diff([0, *cuts, T])
        rows.append([*lengths[:-1], -lengths[-1]] if rng.random() < 0.5 else lengths)
    segments = jax.tree.map(np.asarray, jax.jit(find_segments, static_argnums=1)(ids(*rows), M))
    room = max(M + 1, 2)  # one of them for padding
    assert segments.length_BM.shape == (300, room) and segments.offset_BM.shape == (300, room + 1)
    for b, lengths in enumerate(np.abs(row) for row in rows):
        assert segments.is_overfull_B[b] == (len(lengths) > room)
        if len(lengths) <= room:
            spare = [-1] * (room - len(lengths))
            assert segments.length_BM[b].tolist() == [*lengths, *spare]
            assert segments.offset_BM[b].tolist() == [*np.cumsum([0, *lengths[:-1]]), *spare, -1]


def test_without_a_limit_there_is_room_for_clips_of_three_slots():
    segments = find_segments(jnp.asarray(ids([3] * 10 + [-1])))
    assert not segments.is_overfull_B[0] and segments.length_BM[0].tolist() == [3] * 10 + [1]


# ---- CPU -------------------------------------------------------------------------------------------------------------


def test_segments_are_a_causal_mask():
    q, k, v = some_rows(2, 12)
    segment_BT = ids([5, 4, -3], [12])
    mask_BTS = np.array([np.equal.outer(row, row) & np.tri(12, dtype=bool) for row in segment_BT])
    by_mask = attention(q, k, v, jnp.asarray(mask_BTS))
    np.testing.assert_array_equal(attention(q, k, v, find_segments(jnp.asarray(segment_BT))), by_mask)
    # Slot by slot: head n reads key/value head n // 2, and no slot reads another segment or what comes later.
    seen = (np.arange(12) <= 6) & (segment_BT[0] == segment_BT[0, 6])
    logits = np.asarray(k)[0, :, 1] @ np.asarray(q)[0, 6, 3] / np.sqrt(H)
    weight = np.exp(logits) * seen / (np.exp(logits) * seen).sum()
    np.testing.assert_allclose(by_mask[0, 6, 3], weight @ np.asarray(v)[0, :, 1], rtol=1e-5)


def test_patches_are_a_mask_of_blocks():
    q, k, v = some_rows(2, 12)
    mask_BTS = np.repeat([np.kron(np.eye(3), np.ones((4, 4))) > 0], 2, axis=0)
    got, bound = attn.attention_in_patches(q, k, v, None, attn.Patches(4))
    np.testing.assert_allclose(got, attention(q, k, v, jnp.asarray(mask_BTS)), atol=2e-6)
    assert bound.shape == (6, K), "one bound for each patch"


def test_logits_of_bfloat16_are_not_rounded():
    """Operation by operation, since XLA may leave out roundings. No product of the gradients is in slow float32."""
    rows = [(scale * x).astype(jnp.bfloat16) for x, scale in zip(some_rows(1, 48), (4.0, 4.0, 1.0))]

    def gradients(q, k, v):
        o_BTNH, backward = jax.vjp(lambda *rows: attention(*rows, jnp.ones((1, 48, 48), bool)), q, k, v)
        return [o_BTNH, *backward(jnp.sign(q).astype(o_BTNH.dtype))]

    exact = jax.jit(gradients)(*(x.astype(jnp.float32) for x in rows))
    for got, expected in zip(gradients(*rows), exact):
        assert np.linalg.norm(got.astype(jnp.float32) - expected) < 0.004 * np.linalg.norm(expected)
    program = jax.jit(gradients).lower(*rows).as_text()
    operands = re.findall(r"dot_general .* : \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", program)
    assert operands == [("bf16", "bf16")] * 6


# ---- TPU -------------------------------------------------------------------------------------------------------------

LAYOUTS = {"blocks": ids([100, 90, 66], [200, -56]), "ragged": ids([50, 40, -17], [107])}


@pytest.mark.parametrize(("layout", "window"), [("blocks", None), ("blocks", 100), ("ragged", None)])
def test_splash_equals_xla(layout, window, monkeypatch):
    """Several blocks in a row, as far as the longest segment; and a row that is no whole number of them."""
    monkeypatch.setattr(attn, "_SPLASH_BLOCK_SLOTS", 128)
    segment_BT = jnp.asarray(LAYOUTS[layout])
    rows = some_rows(*segment_BT.shape)
    if window is not None:  # of a padding that is longer, splash sees the end
        segment_BT = segment_BT[:1]
        rows = [x[:1] for x in rows]
    ours = outcome(partial(attn.splash, window=window, interpret=True), *rows, segment_BT)
    for got, expected in zip(ours, outcome(attention, *rows, segment_BT)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


def test_the_share_of_splashs_grid():
    assert attn.splash_share(4096) == 36 / 64 and attn.splash_share(4096, 4096) == 36 / 64
    assert attn.splash_share(4096, 1024) == 21 / 24 and attn.splash_share(4096, 512) == 15 / 16
    assert attn.splash_share(300) == 1


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)])
def test_splash_on_a_mesh(shape):
    """Rows over replica and data, heads over tensor; four devices do not divide two key/value heads."""
    segment_BT = jnp.asarray(ids([40, 24], [64], [10, 20, -34], [60, 4]))
    rows = some_rows(4, 64)
    expected = outcome(attention, *rows, segment_BT)
    with jax.set_mesh(sharding.make_mesh(shape)):
        got = outcome(partial(attn._by_device, partial(attn.splash, interpret=True)), *rows, segment_BT)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


# ---- NVIDIA ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    """JAX believes that there is a Hopper with cuDNN."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    attn._cudnn.cache_clear()
    yield
    attn._cudnn.cache_clear()


def read_as_cudnn_does(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """What the kernel does with its arguments after JAX's own treatment of them: segments by their place in memory."""
    assert mask_type is cudnn.MaskType.PADDING_CAUSAL
    fixed = cudnn._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, q, k)
    length_q, length_k, offset_q, offset_k = (np.asarray(x).reshape(-1) for x in fixed)
    heads, kv_heads, width = q.shape[2], k.shape[2], q.shape[3]
    o = np.full(q.size, np.nan, np.float32)
    flat_q, flat_k, flat_v = (np.asarray(x, np.float32).reshape(-1) for x in (q, k, v))
    for i, n in enumerate(length_q):
        if n <= 0:
            continue
        assert length_k[i] == n
        place, kv_place = slice(offset_q[i], offset_q[i] + n * heads * width), slice(offset_k[i], None)
        q_TNH = flat_q[place].reshape(n, heads, width)
        k_TNH, v_TNH = (
            np.repeat(x[kv_place][: n * kv_heads * width].reshape(n, kv_heads, width), heads // kv_heads, axis=1)
            for x in (flat_k, flat_v)
        )
        logits = np.where(np.tri(n, dtype=bool), np.einsum("tnh,snh->nts", q_TNH, k_TNH) * scale, -np.inf)
        weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
        o[place] = np.einsum("nts,snh->tnh", weight / weight.sum(axis=-1, keepdims=True), v_TNH).reshape(-1)
    return jnp.asarray(o.reshape(q.shape))


def test_cudnn_is_told_where_every_segment_lies(hopper, monkeypatch):
    """Rows of unlike numbers of segments, with padding and without, grouped heads; no slot stays unwritten."""
    monkeypatch.setattr(cudnn, "dot_product_attention", read_as_cudnn_does)
    segment_BT = jnp.asarray(ids([9, 1, 6, 8], [24], [10, -14], [1, 1, 1, 3, 18]))
    q, k, v = some_rows(4, 24, jnp.bfloat16)
    got = attention(q, k, v, find_segments(segment_BT, 5), platform="gpu")
    expected = attention(*(x.astype(jnp.float32) for x in (q, k, v)), find_segments(segment_BT))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_no_cudnn_is_said_aloud_once(monkeypatch, capsys):
    attn._cudnn.cache_clear()
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: False)
    segment_BT = jnp.asarray(ids([5, 3]))
    q, k, v = some_rows(1, 8, jnp.bfloat16)
    got = [attention(q, k, v, find_segments(segment_BT), platform="gpu") for _ in range(2)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "no cuDNN kernel for packed rows (no Hopper or later" in lines[0]
    np.testing.assert_array_equal(got[0], attention(q, k, v, find_segments(segment_BT)))
    attn._cudnn.cache_clear()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    attention(q, k, v, find_segments(segment_BT), platform="gpu")
    assert capsys.readouterr().err == "", "one process of a run speaks for all"
    attn._cudnn.cache_clear()


# ---- what is lowered for machines that are not there -----------------------------------------------------------------


def lowered(platform, T, dtype=jnp.bfloat16, mesh=None):
    """The program of attention and its gradients."""
    rows = tuple(jax.ShapeDtypeStruct((2, T, n, 128), dtype) for n in (N, K, K))

    def total(q, k, v, segment_BT):
        return jnp.sum(attention(q, k, v, find_segments(segment_BT, 16), platform=platform).astype(jnp.float32))

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*rows, jax.ShapeDtypeStruct((2, T), jnp.int32))
    return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()


def largest(text):
    """Numbers in the largest array of a program."""
    return max(math.prod(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<((?:\d+x)+)", text))


def executions(text, call):
    """How often a program executes a custom call, a loop's body counted once.

    Its mentions say less: whether both language models call one function or a copy each depends on the version of JAX.
    """
    functions = dict(re.findall(r"func\.func \w+ @(\w+)(.*?)(?=func\.func|\Z)", text, re.DOTALL))

    def count(name):
        called = re.findall(r"\bcall @(\w+)", functions[name])
        return functions[name].count(f"@{call}(") + sum(map(count, called))

    return count("main")


CALLS = {"gpu": ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"), "tpu": ("tpu_custom_call",)}


@pytest.mark.parametrize("platform", CALLS)
def test_kernels_are_lowered_with_memory_linear_in_slots(platform, hopper):
    texts = [lowered(platform, T) for T in (1024, 2048)]
    for call in CALLS[platform]:
        assert f"@{call}(" in texts[0]
    assert "1024x1024" not in texts[0] and "2048x2048" not in texts[1]
    assert largest(texts[1]) == 2 * largest(texts[0])
    assert largest(lowered("cpu", 2048)) == 4 * largest(lowered("cpu", 1024)), "a dense mask would be seen"


@pytest.mark.parametrize("platform", CALLS)
def test_float32_stays_with_xla(platform, hopper):
    text = lowered(platform, 256, jnp.float32)
    assert not any(call in text for call in CALLS[platform]) and "256x256" in text


@pytest.mark.parametrize("platform", CALLS)
def test_the_models_loss_uses_the_kernels_on_a_mesh(platform, hopper):
    """Both language models, forward, once more, and backward; the local ones never."""
    config = MODELS["small"]
    patch_shape = (config.patch_size, config.feat_dim)
    clip = sequence.lay_out(np.arange(110, 114), target_MPC=np.zeros((8, *patch_shape), np.float32))
    batch = sequence.pack([[clip, clip]] * 8, num_slots=128, num_patches=16, patch_shape=patch_shape)
    draws = {"time_BM": np.ones((8, 16)), "noise_BMPC": batch.patches_BMPC, "drop_BM": np.zeros((8, 16), bool)}
    shapes = jax.eval_shape(lambda key: voxcpm2.init(key, config), jax.random.key(0))

    def total(params):
        sums = voxcpm2.loss(params, config, batch, **draws, compute=Compute(max_segments=2, platform=platform))
        return sums["diff"][0] + sums["stop"][0]

    with jax.set_mesh(sharding.make_mesh((2, 2, 2))):
        traced = jax.jit(jax.grad(total)).trace(shapes)
        text = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()
    counts = {"gpu": [4, 2], "tpu": [8]}  # cuDNN's passes have a name each; splash has two backward
    assert [executions(text, call) for call in CALLS[platform]] == counts[platform]
