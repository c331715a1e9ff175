"""LongRoPE: rotary positions whose frequencies are stretched, each by a factor of its own.

Source: LongRoPE (arXiv 2402.13753).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from voxcpm2_jax.config.model import TransformerConfig


class Rope(NamedTuple):
    cos_BTH: jax.Array  # float32, over half a head
    sin_BTH: jax.Array


def rope_table(config: TransformerConfig, position_BT: jax.Array) -> Rope | None:
    """Cosines and sines for every position; None for a stack without positional encoding."""
    if config.rope_factor is None:
        return None
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    # In this order and in float32: angles of late positions are large, so their rounding is part of the model.
    per_slot = position_BT.astype(jnp.float32)[..., None] * (1.0 / jnp.asarray(config.rope_factor, jnp.float32))[None, None]
    angle_BTH = per_slot * (1.0 / config.rope_theta**half)[None, None]
    return Rope(jnp.cos(angle_BTH) * config.rope_scale, jnp.sin(angle_BTH) * config.rope_scale)


def rotate(x_BTNH: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = rope.cos_BTH[:, :, None], rope.sin_BTH[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
