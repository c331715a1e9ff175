"""Counts of the four transformer stacks: positions, parameters, useful FLOPs and MFU.

A position is one token of a stack's input:

    stack     positions                        attention
    tslm      slots of the row                 causal, within a clip
    ralm      slots of the row                 causal, within a clip
    locenc    1 + P for each audio patch       all pairs within a patch
    locdit    3 + 2 P for each target patch    all pairs within a patch

Useful FLOPs are those of matrix products and attention on real slots and patches. Padding, recomputation in the backward
pass and attention between clips do not count.
"""

from collections.abc import Iterable

import jax

from voxcpm2_jax import chips
from voxcpm2_jax.config.model import ModelConfig, TransformerConfig

STACKS = ("locenc", "tslm", "ralm", "locdit")
PRODUCTS = ("qkv", "o", "gate", "up", "down")  # matrix products of a layer


# ---- geometry --------------------------------------------------------------------------------------------------------


def positions(config: ModelConfig, *, slots, patches, targets) -> dict[str, float]:
    """Positions that each stack runs over.

    Args:
        slots: text tokens and patches.   patches: audio patches, LocEnc's input.   targets: patches that LocDiT predicts.
    """
    return {
        "locenc": patches * config.locenc_slots,
        "tslm": slots,
        "ralm": slots,
        "locdit": targets * config.locdit_slots,
    }


def layer_widths(c: TransformerConfig) -> dict[str, int]:
    """Elements per position of a layer's activations: residual stream, q with k and v, attention's result, mlp."""
    return {
        "residual": c.width,
        "qkv": (c.num_heads + 2 * c.num_kv_heads) * c.head_dim,
        "attention": c.num_heads * c.head_dim,
        "mlp": c.mlp_width,
    }


def layer_params(c: TransformerConfig, products: Iterable[str] = PRODUCTS) -> int:
    """Parameters of these products' matrices in one layer; norm scales are not counted."""
    width, qkv, attention, mlp = layer_widths(c).values()
    params = {"qkv": width * qkv, "o": attention * width, "gate": width * mlp, "up": width * mlp, "down": mlp * width}
    return sum(params[name] for name in products)


def num_params(model: ModelConfig) -> int:
    """Parameters of the backbone's matrices; norms, biases and the special token would add about 0.03 %."""
    width, local, C, Q = model.tslm.width, model.locdit.width, model.feat_dim, model.scalar_quantization_latent_dim
    stacks = sum(getattr(model, part).num_layers * layer_params(getattr(model, part)) for part in STACKS)
    rest = (
        model.lm_config.vocab_size * width
        + C * model.locenc.width
        + 3 * C * local
        + 4 * local * local
        + 2 * width * Q
        + model.locenc.width * width
        + 2 * width * local
        + 3 * width * width
        + 2 * width
    )
    return stacks + rest


# ---- useful FLOPs ----------------------------------------------------------------------------------------------------


def forward_flops(config: ModelConfig, *, slots, patches, targets, squares) -> dict[str, float]:
    """Useful FLOPs of one forward pass, by part.

    Args:
        slots: slots in use (text and audio).   patches: audio patches in use.   targets: patches that bear loss.
        squares: sum of the squared lengths of all segments, in slots.
    """
    c = config
    width, local, P, C, Q = c.tslm.width, c.locdit.width, c.patch_size, c.feat_dim, c.scalar_quantization_latent_dim
    causal_pairs = (squares + slots) / 2
    of_stack = positions(c, slots=slots, patches=patches, targets=targets)
    projections = (
        patches * c.locenc.width * width  # enc_to_lm_proj
        + slots * 2 * width * width  # fusion_concat_proj
        + targets * 2 * width * local  # lm_to_dit_proj, res_to_dit_proj
    )
    return {
        "tslm": _stack_flops(c.tslm, of_stack["tslm"], causal_pairs),
        "ralm": _stack_flops(c.ralm, of_stack["ralm"], causal_pairs),
        "locenc": _stack_flops(c.locenc, of_stack["locenc"], of_stack["locenc"] * c.locenc_slots)
        + 2 * patches * P * C * c.locenc.width,  # in projection
        "locdit": _stack_flops(c.locdit, of_stack["locdit"], of_stack["locdit"] * c.locdit_slots)
        + 2 * targets * (3 * P * C * local + 4 * local * local),  # in, cond, out projections; the two time MLPs
        "fsq": 2 * patches * 2 * width * Q,
        "projections": 2 * projections,
        "stop": 2 * targets * (width * width + 2 * width),
    }


def _stack_flops(c: TransformerConfig, positions, pairs) -> float:
    """FLOPs of a stack's layers over `positions`, with `pairs` (query, key) pairs in each attention."""
    return 2.0 * c.num_layers * (positions * layer_params(c) + pairs * 2 * c.num_heads * c.head_dim)


def train_flops(config: ModelConfig, *, slots, patches, targets, squares) -> float:
    """Useful FLOPs of one update: three times the forward pass. Arguments as in `forward_flops`."""
    parts = forward_flops(config, slots=slots, patches=patches, targets=targets, squares=squares)
    return 3.0 * sum(parts.values())


# ---- MFU -------------------------------------------------------------------------------------------------------------


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one JAX device by `jax.Device.device_kind`; None for an unknown device (a CPU)."""
    chip = chips.of_kind(device_kind)
    return None if chip is None else chip.device_flops


def mfu(flops: float, step_sec: float) -> float | None:
    """Model FLOP utilisation of all devices, 0 to 1, for `flops` useful FLOPs per step; None on unknown devices."""
    peak = peak_flops(jax.devices()[0].device_kind)
    return None if peak is None else flops / (step_sec * peak * jax.device_count())
