"""Attention within patches, on TPU: a Pallas kernel for LocEnc's 5 and LocDiT's 11 positions.

XLA's attention over such short sequences costs more than all products of a layer together, although it computes almost
nothing: heads have to leave their lanes, 11 positions are padded to 16, and every step writes an array of its own. The kernel
reads q, k and v as the products write them and writes what the next product reads: rows of positions, all heads side by side
in the lanes.

    q_XE [rows, N x 128]    rows: the positions of whole patches, one after the other
    k_XF [rows, K x 128]    a group: patches of at most 128 rows together, the columns of one product

For each group and key/value head it turns q and k (RoPE: a product with cosines plus the other half of the head, one lane
rotation, times signed sines), multiplies all query heads of the head with the keys of the group in one product, discards the
logits between patches by a bias, and multiplies the probabilities with the values. Most logits are discarded, but on a matrix
unit of 128 x 128 they cost nothing: a product with fewer columns takes as long. The backward pass computes the probabilities
again, so nothing is kept but q, k and v.

Logits, softmax and RoPE are float32; products are in the dtype of q. tests/models/test_local_attention.py compares it with
XLA's attention, interpreted on a CPU.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

HEAD_DIM = 128  # the kernel's: a head fills the lanes
_SUBLANES = 8
_GROUPS = 4  # of patches, at most, per step of the grid
_STEP_BYTES = 10 * 2**20  # of the fast memory, for what a step of the backward pass reads and writes, twice: one is on its way
_FAR = -1e30


class Shape(NamedTuple):
    """Static sizes of a call."""

    slots: int  # positions of a patch
    num_heads: int
    num_kv_heads: int
    group_rows: int  # rows of a group: whole patches
    step_rows: int  # rows of a step of the grid: whole groups

    @classmethod
    def of(cls, slots: int, num_heads: int, num_kv_heads: int, rows: int) -> "Shape":
        """The sizes for so many rows: groups of at most 128 rows if possible, of a multiple of 8, and such that they divide
        all rows if possible. Otherwise rows are to be padded to whole groups."""
        least = math.lcm(slots, _SUBLANES)
        most = max(1, 128 // least)
        group = least * next((n for n in range(most, 0, -1) if rows % (n * least) == 0), most)
        groups, most = -(-rows // group), min(_GROUPS, _STEP_BYTES // (group * row_bytes(num_heads, num_kv_heads)))
        return cls(slots, num_heads, num_kv_heads, group, group * max(n for n in range(1, most + 1) if groups % n == 0))


def row_bytes(num_heads: int, num_kv_heads: int) -> int:
    """Bytes of the fast memory for a row of the backward pass: q, k, v, do, dq, dk and dv in bfloat16, twice."""
    return 2 * 2 * HEAD_DIM * (3 * num_heads + 4 * num_kv_heads)


def fits(slots: int, num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernel can be used: heads fill the lanes, and the smallest group fits the fast memory."""
    least = math.lcm(slots, _SUBLANES) * row_bytes(num_heads, num_kv_heads)
    return head_dim == HEAD_DIM and least * max(1, 128 // math.lcm(slots, _SUBLANES)) <= _STEP_BYTES


def patch_attention(q_BXE, k_BXF, v_BXF, cos_TH, sin_TH, *, interpret: bool = False):
    """Softmax attention of every position to all positions of its own patch, with RoPE.

    Args:
        q_BXE, k_BXF, v_BXF: X = patches x slots; E = heads x 128, F = key/value heads x 128.
        cos_TH, sin_TH: float32 [slots, 128]: the cosine of each lane; the sine, negative in the first half of the lanes.
        interpret: run on any platform, slowly.
    Returns:
        o_BXE, and the greatest logit of each step of the grid, float32 [B, steps, 1, 128], without gradient.
    """
    X, slots = q_BXE.shape[1], len(cos_TH)
    assert X % slots == 0, (X, slots)
    shape = Shape.of(slots, q_BXE.shape[2] // HEAD_DIM, k_BXF.shape[2] // HEAD_DIM, X)
    padding = -X % shape.group_rows
    q_BXE, k_BXF, v_BXF = (jnp.pad(x, ((0, 0), (0, padding), (0, 0))) if padding else x for x in (q_BXE, k_BXF, v_BXF))
    o_BXE, greatest = _attention(shape, interpret, q_BXE, k_BXF, v_BXF, cos_TH, sin_TH)
    return o_BXE[:, :X] if padding else o_BXE, greatest


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(shape: Shape, interpret: bool, q_BXE, k_BXF, v_BXF, cos_TH, sin_TH):
    tables = _tables(shape, cos_TH, sin_TH)
    B, X, _ = q_BXE.shape
    greatest = jax.ShapeDtypeStruct((B, X // shape.step_rows, 1, HEAD_DIM), jnp.float32)
    return _call(_forward_kernel, shape, interpret, (q_BXE, k_BXF, v_BXF), tables, (q_BXE, greatest), "patch_attention")


def _forward(shape, interpret, q_BXE, k_BXF, v_BXF, cos_TH, sin_TH):
    return _attention(shape, interpret, q_BXE, k_BXF, v_BXF, cos_TH, sin_TH), (q_BXE, k_BXF, v_BXF, cos_TH, sin_TH)


def _backward(shape, interpret, saved, gradients):
    do_BXE, _ = gradients
    q_BXE, k_BXF, v_BXF, cos_TH, sin_TH = saved
    tables, rows = _tables(shape, cos_TH, sin_TH), (q_BXE, k_BXF, v_BXF, do_BXE.astype(q_BXE.dtype))
    dq, dk, dv = _call(_backward_kernel, shape, interpret, rows, tables, (q_BXE, k_BXF, v_BXF), "patch_attention_backward")
    return dq, dk, dv, jnp.zeros_like(cos_TH), jnp.zeros_like(sin_TH)


_attention.defvjp(_forward, _backward)


def _tables(shape: Shape, cos_TH, sin_TH) -> tuple[jax.Array, ...]:
    """What every group reads: cosines and sines of its rows for k, the same times 1 / sqrt(H) for q, and the bias."""
    S, T = shape.group_rows, shape.slots
    cos_SH, sin_SH = (jnp.tile(x_TH, (S // T, 1)) for x_TH in (cos_TH, sin_TH))
    patch_S = np.arange(S) // T
    bias_SS = jnp.asarray(np.where(patch_S[:, None] == patch_S[None], 0.0, _FAR), jnp.float32)
    scale = HEAD_DIM**-0.5
    return cos_SH, sin_SH, cos_SH * scale, sin_SH * scale, bias_SS


def _call(kernel, shape: Shape, interpret: bool, rows, tables, results, name: str):
    """Runs a kernel over blocks of rows; `tables` are read whole by every step, `results` shaped like these arrays."""
    B, X, _ = rows[0].shape
    step = shape.step_rows

    def block(x):
        if x.ndim == 4:  # one entry for every step
            return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, i: (b, i, 0, 0))
        return pl.BlockSpec((1, step, x.shape[2]), lambda b, i: (b, i, 0))

    return pl.pallas_call(
        functools.partial(kernel, shape, step // shape.group_rows),
        grid=(B, X // step),
        in_specs=[block(x) for x in rows] + [pl.BlockSpec(x.shape, lambda b, i: (0, 0)) for x in tables],
        out_specs=[block(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=name,
    )(*rows, *tables)


# ---- inside the kernels ----------------------------------------------------------------------------------------------


def _head(ref, at, rows: int, head: int):
    """[rows, 128] of one head, from row `at` on."""
    return ref[0, at : at + rows, head * HEAD_DIM : (head + 1) * HEAD_DIM]


def _turn(x_SH, cos_SH, sin_SH):
    """RoPE, in float32."""
    x_SH = x_SH.astype(jnp.float32)
    return x_SH * cos_SH + pltpu.roll(x_SH, HEAD_DIM // 2, axis=1) * sin_SH


def _turn_back(dy_SH, cos_SH, sin_SH):
    """The gradient of `_turn`."""
    return dy_SH * cos_SH - pltpu.roll(dy_SH, HEAD_DIM // 2, axis=1) * sin_SH


def _dot(a, b, contract: tuple[int, int]):
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _probabilities(q_ZH, k_SH, bias_SS):
    """[Z, S] float32, and the greatest logit [Z, 1] of each row; Z: the rows of all query heads, below each other."""
    S = len(k_SH)
    logits_ZS = _dot(q_ZH, k_SH, (1, 1))
    logits_GSS = logits_ZS.reshape(-1, S, S) + bias_SS[None]
    logits_ZS = logits_GSS.reshape(logits_ZS.shape)
    greatest_Z1 = jnp.max(logits_ZS, axis=1, keepdims=True)
    e_ZS = jnp.exp(logits_ZS - greatest_Z1)
    return e_ZS * (1.0 / jnp.sum(e_ZS, axis=1, keepdims=True)), greatest_Z1


def _forward_kernel(shape: Shape, num_groups: int, q_ref, k_ref, v_ref, cos, sin, cos_q, sin_q, bias, o_ref, max_ref):
    S, G, dtype = shape.group_rows, shape.num_heads // shape.num_kv_heads, q_ref.dtype
    greatest = jnp.full((1, 1), -jnp.inf, jnp.float32)
    for group in range(num_groups):
        at = group * S
        for kv in range(shape.num_kv_heads):
            k_SH = _turn(_head(k_ref, at, S, kv), cos[...], sin[...]).astype(dtype)
            heads = range(kv * G, (kv + 1) * G)
            q_ZH = jnp.concatenate([_turn(_head(q_ref, at, S, head), cos_q[...], sin_q[...]) for head in heads]).astype(dtype)
            probs_ZS, greatest_Z1 = _probabilities(q_ZH, k_SH, bias[...])
            greatest = jnp.maximum(greatest, jnp.max(greatest_Z1, axis=0, keepdims=True))
            o_ZH = _dot(probs_ZS.astype(dtype), _head(v_ref, at, S, kv), (1, 0)).astype(dtype)
            for i, head in enumerate(heads):
                o_ref[0, at : at + S, head * HEAD_DIM : (head + 1) * HEAD_DIM] = o_ZH[i * S : (i + 1) * S]
    max_ref[0, 0] = jnp.broadcast_to(greatest, (1, HEAD_DIM))


def _backward_kernel(
    shape: Shape, num_groups: int, q_ref, k_ref, v_ref, do_ref, cos, sin, cos_q, sin_q, bias, dq_ref, dk_ref, dv_ref
):
    S, G, dtype = shape.group_rows, shape.num_heads // shape.num_kv_heads, q_ref.dtype
    for group in range(num_groups):
        at = group * S
        for kv in range(shape.num_kv_heads):
            k_SH = _turn(_head(k_ref, at, S, kv), cos[...], sin[...]).astype(dtype)
            v_SH = _head(v_ref, at, S, kv)
            heads = range(kv * G, (kv + 1) * G)
            q_ZH = jnp.concatenate([_turn(_head(q_ref, at, S, head), cos_q[...], sin_q[...]) for head in heads]).astype(dtype)
            do_ZH = jnp.concatenate([_head(do_ref, at, S, head) for head in heads])
            probs_ZS, _ = _probabilities(q_ZH, k_SH, bias[...])
            dprobs_ZS = _dot(do_ZH, v_SH, (1, 1))
            dlogits_ZS = probs_ZS * (dprobs_ZS - jnp.sum(probs_ZS * dprobs_ZS, axis=1, keepdims=True))
            dlogits_ZS, probs_ZS = dlogits_ZS.astype(dtype), probs_ZS.astype(dtype)
            dq_ZH = _dot(dlogits_ZS, k_SH, (1, 0))
            dk_SH, dv_SH = _dot(dlogits_ZS, q_ZH, (0, 0)), _dot(probs_ZS, do_ZH, (0, 0))
            lanes = slice(kv * HEAD_DIM, (kv + 1) * HEAD_DIM)
            dk_ref[0, at : at + S, lanes] = _turn_back(dk_SH, cos[...], sin[...]).astype(dtype)
            dv_ref[0, at : at + S, lanes] = dv_SH.astype(dtype)
            for i, head in enumerate(heads):
                dq_SH = _turn_back(dq_ZH[i * S : (i + 1) * S], cos_q[...], sin_q[...])
                dq_ref[0, at : at + S, head * HEAD_DIM : (head + 1) * HEAD_DIM] = dq_SH.astype(dtype)
