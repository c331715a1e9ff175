"""Attention of all stacks: it picks the kernel of the platform.

    what a slot attends to                  "tpu"                 "gpu"                    "cpu"
    Segments: itself and what came before   splash                cuDNN, packed offsets    XLA, dense mask
    a mask [B, T, S] (generation's cache)   XLA                   XLA                      XLA
    Patches: its patch (LocEnc, LocDiT)     local_attention.py    XLA                      XLA

The memory of the kernels is linear in T, that of XLA is quadratic. The kernels multiply only in bfloat16 or float16. So
float32 uses XLA on every platform, because float32 has to mean float32. The slots of a patch are few: 1 + P = 5 in LocEnc and
3 + 2 P = 11 in LocDiT for the release's P = 4 frames. cuDNN refuses such lengths, and splash, with blocks of 128, would
compute mostly padding.

The kernels run in `shard_map` over the mesh in use, each on the rows and heads of one device. Heads are split if the tensor
axis divides the key/value heads; otherwise every device of that axis computes all heads. The platform is an argument,
because programs are also compiled for TPUs that are not present. On "gpu", JAX decides whether cuDNN and the devices support
packed rows, so a program for GPUs has to be compiled on a machine with such GPUs.

Sources: splash attention (jax.experimental.pallas.ops.tpu); cuDNN's packed layout. tests/measure_kernels.py times both.
"""

import dataclasses
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp

from voxcpm2_jax import processes, sharding
from voxcpm2_jax.models import local_attention
from voxcpm2_jax.models.product import einsum
from voxcpm2_jax.models.rope import Rope, rotate

MIN_SEGMENT_SLOTS = 3  # of the shortest clip in sequence.py: two special tokens and a patch
_LANES = 128  # the blocks of splash are multiples of this many slots
_SPLASH_BLOCK_SLOTS = 512  # at most; larger blocks compute more of what the causal mask discards


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Patches:
    """Every `slots` slots are a patch, and attend to all of it and to nothing else."""

    slots: int


class Segments(NamedTuple):
    """The clips of packed rows: a slot attends to itself and to earlier slots of its own segment.

    The slots of a segment are contiguous. Padding (id 0) is a segment too; its values are not read.
    """

    id_BT: jax.Array
    length_BM: jax.Array  # int32: slots of each segment, -1 for unused entries
    offset_BM: jax.Array  # int32, [B, M + 1]: first slot of each segment in its row; -1 for unused entries and for the last
    is_overfull_B: jax.Array  # the row has more than M segments, which cuDNN would ignore, or one that is too long for splash


def find_segments(segment_BT: jax.Array, max_segments: int | None = None, most_slots: int | None = None) -> Segments:
    """The segments of packed rows in the form that the kernels need; computed once per step, not per layer.

    Here M counts segments, not patches.

    Args:
        segment_BT: contiguous equal ids are a segment.
        max_segments: most clips in a row, static; cuDNN's time and memory grow with it. None: as many as fit.
        most_slots: of a clip; None: all of a row.
    """
    B, T = segment_BT.shape
    M = max(2, (max_segments or T // MIN_SEGMENT_SLOTS) + 1)  # one more for the padding
    is_first_BT = jnp.pad(segment_BT[:, 1:] != segment_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    rank_BT = jnp.cumsum(is_first_BT, axis=1, dtype=jnp.int32) - 1
    # The last offset stays -1: with a number there cuDNN joins the rows and silently gives wrong results.
    put_BT = jnp.where(is_first_BT & (rank_BT < M), rank_BT, M + 1)
    slot_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    offset_BM = jnp.full((B, M + 1), -1, jnp.int32).at[jnp.arange(B)[:, None], put_BT].set(slot_BT, mode="drop")
    first_BM, next_BM = offset_BM[:, :-1], offset_BM[:, 1:]
    length_BM = jnp.where(first_BM < 0, -1, jnp.where(next_BM < 0, T, next_BM) - first_BM)
    is_overfull_B = rank_BT[:, -1] >= M
    if most_slots is not None:
        is_clip_BM = jnp.take_along_axis(segment_BT, jnp.maximum(first_BM, 0), axis=1) > 0
        is_overfull_B |= jnp.any(is_clip_BM & (length_BM > most_slots), axis=1)
    return Segments(segment_BT, length_BM, offset_BM, is_overfull_B)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sees: Segments | jax.Array,
    *,
    window: int | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Softmax attention of N query heads over K <= N shared key/value heads.

    Args:
        sees: what slots attend to: `Segments` or a mask [B, T, S].
        window: most slots of a segment, static; None: all of a row. Splash skips what is further away.
        platform: whose kernel is used: "cpu", "gpu" or "tpu"; None: see `sharding.current_platform`.
    """
    if not isinstance(sees, Segments):
        return _xla(q_BTNH, k_BSKH, v_BSKH, sees)
    platform = platform or sharding.current_platform()
    if platform == "tpu" and q_BTNH.dtype != jnp.float32:
        return _by_device(functools.partial(splash, window=window), q_BTNH, k_BSKH, v_BSKH, sees)
    if platform == "gpu" and q_BTNH.dtype != jnp.float32 and (kernel := _cudnn()):
        return _by_device(functools.partial(_packed, kernel), q_BTNH, k_BSKH, v_BSKH, sees)
    return _xla(q_BTNH, k_BSKH, v_BSKH, causal_mask(sees.id_BT))


def attention_in_patches(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, rope: Rope | None, patches: Patches, *, platform: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attention within every patch of a row. It also does RoPE, which is the same in every patch.

    Args:
        rope: of the slots of one patch.   platform: as in `attention`.
    Returns:
        o_BTNH, and an upper bound of the logits for every patch or more: their maximum from the kernel, else `logit_bound`.
    """
    platform = platform or sharding.current_platform()
    N, H = q_BTNH.shape[2:]
    is_kernel = platform == "tpu" and q_BTNH.dtype != jnp.float32
    if is_kernel and local_attention.fits(patches.slots, N, k_BTKH.shape[2], H):
        return _by_device(functools.partial(_in_patches, patches), q_BTNH, k_BTKH, v_BTKH, rope)
    q, k, v = (x.reshape(-1, patches.slots, *x.shape[2:]) for x in (q_BTNH, k_BTKH, v_BTKH))
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    return _xla(q, k, v, None).reshape(q_BTNH.shape), logit_bound(q, k)


def logit_bound(q_BTNH: jax.Array, k_BTKH: jax.Array) -> jax.Array:
    """[B, K]: an upper bound of the attention logits: longest query times longest key of a row and head (Cauchy-Schwarz).

    The kernels do not return logits, and computing their true maximum would cost as much as attention itself.
    """
    q_BTNH, k_BTKH = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (q_BTNH, k_BTKH))
    q_BN, k_BK = (jnp.max(jnp.sum(x * x, axis=-1), axis=1) for x in (q_BTNH, k_BTKH))
    q_BK = jnp.max(q_BN.reshape(*k_BK.shape, -1), axis=-1)
    return jnp.sqrt(q_BK * k_BK / q_BTNH.shape[-1])


def causal_mask(segment_BT: jax.Array) -> jax.Array:
    """[B, T, T]: a slot attends to itself and to earlier slots of its own segment."""
    same_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
    T = segment_BT.shape[1]
    return same_BTS & jnp.tri(T, dtype=bool)[None]


# ---- XLA -------------------------------------------------------------------------------------------------------------


@jax.custom_jvp
def _logits(q_BXH: jax.Array, k_BSH: jax.Array) -> jax.Array:
    """q k' [B, X, S] in float32, as the products accumulate it, and not rounded to the dtype of q and k.

    Its derivative is that of the product in the dtype of q and k, so that the gradients of the logits are rounded and the
    backward products are not between float32 and bfloat16, which TPUs and GPUs multiply at a fraction of their speed.
    """
    return einsum("BXH,BSH->BXS", q_BXH, k_BSH, dtype=jnp.float32)


@_logits.defjvp
def _logits_jvp(primals, tangents):
    (q_BXH, k_BSH), (dq_BXH, dk_BSH) = primals, tangents
    slope_BXS = einsum("BXH,BSH->BXS", dq_BXH, k_BSH) + einsum("BXH,BSH->BXS", q_BXH, dk_BSH)
    return _logits(q_BXH, k_BSH), slope_BXS.astype(jnp.float32)


def _xla(q_BTNH, k_BSKH, v_BSKH, mask_BTS) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    # The heads of a group become rows of one product, and all leading dims one batch dim: 3.6 times faster on CPU.
    q_BKXH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G * T, H)
    k_BKSH, v_BKSH = (x_BSKH.transpose(0, 2, 1, 3).reshape(B * K, S, H) for x_BSKH in (k_BSKH, v_BSKH))
    logits_BKGTS = _logits(q_BKXH, k_BKSH).reshape(B, K, G, T, S) * H**-0.5
    if mask_BTS is not None:
        logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, jnp.finfo(jnp.float32).min)
    probs_BKXS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype).reshape(B * K, G * T, S)
    o_BKXH = einsum("BXS,BSH->BXH", probs_BKXS, v_BKSH)
    o_BTNH = o_BKXH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
    return sharding.constrain(o_BTNH, "batch", None, "heads", None)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _by_device(kernel, q_BTNH, k_BSKH, v_BSKH, more: Segments | Rope | None):
    """Runs a kernel on each device's rows and heads.

    Args:
        more: Segments, which are split with the rows, or what each device needs whole: the kernel of patches, which also
            returns an array [rows, steps, 1, lanes].
    """
    mesh = sharding.mesh_in_use()
    if mesh.empty:
        return kernel(q_BTNH, k_BSKH, v_BSKH, more)
    kv = sharding.spec(k_BSKH.shape, ("batch", None, "kv_heads", None), mesh)
    heads = kv[2]  # a group's query heads stay with their key/value head
    q = jax.P(kv[0], None, heads, None)
    is_packed = isinstance(more, Segments)
    others = jax.tree.map(lambda x: jax.P(kv[0] if is_packed else None, *(None,) * (x.ndim - 1)), more)
    results = q if is_packed else (q, jax.P(kv[0], None, None, heads))
    return jax.shard_map(kernel, in_specs=(q, kv, kv, others), out_specs=results, check_vma=False)(q_BTNH, k_BSKH, v_BSKH, more)


def _in_patches(patches: Patches, q_BTNH, k_BTKH, v_BTKH, rope: Rope | None, *, interpret: bool = False):
    """TPU: the kernel of local_attention.py -> o_BTNH, the greatest logits [B, steps, 1, 128]."""
    H = q_BTNH.shape[-1]
    if rope is None:
        cos_TH, sin_TH = jnp.ones((patches.slots, H)), jnp.zeros((patches.slots, H))
    else:
        cos_TH, sin_TH = jnp.tile(rope.cos_BTH[0], 2), jnp.concatenate([-rope.sin_BTH[0], rope.sin_BTH[0]], axis=-1)
    q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q_BTNH, k_BTKH, v_BTKH))
    o_BTE, greatest = local_attention.patch_attention(q, k, v, cos_TH, sin_TH, interpret=interpret)
    return o_BTE.reshape(q_BTNH.shape), greatest


def splash(q_BTNH, k_BSKH, v_BSKH, segments: Segments, *, window: int | None = None, interpret: bool = False) -> jax.Array:
    """TPU: splash attention, a Pallas kernel in blocks. Rows are padded to whole blocks with slots that are masked out.

    Args:
        window: as in `attention`.   interpret: runs it on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    block = min(_SPLASH_BLOCK_SLOTS, T + -T % _LANES)
    padding = -T % block

    def by_head(x, fill=0):
        return jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2), constant_values=fill)

    # The kernel has no scale argument.
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)
    q_BKGTH = by_head(q_BTNH).reshape(B, T + padding, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = (by_head(x_BSKH).transpose(0, 2, 1, 3) for x_BSKH in (k_BSKH, v_BSKH))
    id_BT = by_head(segments.id_BT, fill=-1)
    shape = (T + padding, T + padding)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mqa(
        splash.MultiHeadMask([mask] * (N // K)),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block,
            block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1, q_seq_shards=1, interpret=interpret, residual_checkpoint_name="attention",
    )  # fmt: skip

    def row(q_KGTH, k_KSH, v_KSH, id_T):
        ids = splash.SegmentIds(id_T, id_T)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(q_KGTH, k_KSH, v_KSH)

    o_BKGTH = jax.vmap(row)(q_BKGTH, k_BKSH, v_BKSH, id_BT)
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T + padding, N, H)[:, :T]


def splash_share(slots: int, window: int | None = None) -> float:
    """The share of the steps of splash's grid that compute anything, in rows of so many slots.

    Args:
        window: as in `attention`. The grid is as wide as the most blocks of keys that a block of queries sees.
    """
    block = min(_SPLASH_BLOCK_SLOTS, slots + -slots % _LANES)
    blocks = -(-slots // block)
    seen = [1 + min(i, -(-((window or slots) - 1) // block)) for i in range(blocks)]
    return sum(seen) / (blocks * max(seen))


def _packed(kernel, q_BTNH, k_BSKH, v_BSKH, segments: Segments) -> jax.Array:
    """GPU: cuDNN's flash attention over packed rows."""
    length_BM, offset_BM = segments.length_BM, segments.offset_BM
    return kernel(
        q_BTNH, k_BSKH, v_BSKH, q_seqlen=length_BM, kv_seqlen=length_BM, q_offsets=offset_BM, kv_offsets=offset_BM,
        scale=q_BTNH.shape[-1] ** -0.5,
    )  # fmt: skip


@functools.cache
def _cudnn():
    """cuDNN's attention over packed rows, from a private module of JAX; None, with a warning, if it is not available.

    The public `jax.nn.dot_product_attention` takes no offsets, so it would need a dense T x T bias.
    """
    why = None
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn
    except ImportError as error:
        why = str(error)
    else:
        known = inspect.signature(cudnn.dot_product_attention).parameters
        if missing := {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type"} - set(known):
            why = f"dot_product_attention without {', '.join(sorted(missing))}"
        elif not cudnn.check_compute_capability("9.0"):
            why = "no Hopper or later among the devices"
    if why:
        fallback = "using XLA with a dense mask, which is slower and needs memory that grows with slots^2"
        processes.say(f"attention: no cuDNN kernel for packed rows ({why}; jax {jax.__version__}): {fallback}")
        return None

    def run(q_BTNH, k_BSKH, v_BSKH, **kwargs):
        if jax.__version_info__ < (0, 11, 2):
            # These versions count key offsets in query heads: silently wrong unless there are as many key heads.
            k_BSKH, v_BSKH = (jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
        return cudnn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask_type=cudnn.MaskType.PADDING_CAUSAL, **kwargs)

    return run
