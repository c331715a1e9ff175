"""Generation, one patch at a time: read the prefix, draw the next patch, read it; the loop is inference/decode.py.

Parameters are those of the unrolled form (`voxcpm2.unrolled_params`). A row does not depend on its neighbours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from voxcpm2_jax.config.model import ModelConfig
from voxcpm2_jax.models import flow
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.transformer import empty_cache
from voxcpm2_jax.models.voxcpm2 import Cache, VoxCPM2, patch_index, take
from voxcpm2_jax.sequence import Batch


class Step(NamedTuple):
    """State of generation between two patches."""

    semantic_BD: jax.Array  # h' of the last slot
    acoustic_BD: jax.Array  # r of the last slot
    cond_BPC: jax.Array  # patch of the last slot, zeros if that is text; float32
    length_B: jax.Array  # slots seen so far
    cache: Cache


def prefill(params, config: ModelConfig, batch: Batch, *, cache_slots: int) -> Step:
    """Runs the language models over the prefixes, one per row, from slot 0 on and padded on the right.

    Args:
        cache_slots: S, slots for the prefix and the patches drawn after it.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    B = len(batch.tokens_BT)
    dtype = jnp.dtype(config.dtype)
    cache = Cache(empty_cache(config.tslm, B, cache_slots, dtype), empty_cache(config.ralm, B, cache_slots, dtype))
    hidden = VoxCPM2(config, Compute(is_unrolled=True)).apply({"params": params}, batch, cache, method="read_batch")
    length_B = jnp.sum((batch.segment_BT > 0).astype(jnp.int32), axis=1)
    last_B1 = length_B[:, None] - 1
    patch_B1 = jnp.take_along_axis(patch_index(batch), last_B1, axis=1)
    return Step(
        take(hidden.semantic_BTD, last_B1)[:, 0],
        take(hidden.acoustic_BTD, last_B1)[:, 0],
        take(batch.patches_BMPC, patch_B1)[:, 0],
        length_B,
        hidden.cache,
    )


def draw_patch(params, config: ModelConfig, step: Step, noise_BPC, *, num_steps: int, cfg_value):
    """Draws the next patch and decides whether it is the last.

    Returns:
        patch_BPC float32; stop_B bool: the stop class has the larger logit.
    """
    model = VoxCPM2(config, Compute(is_unrolled=True))
    prefix_B2D = model.apply({"params": params}, step.semantic_BD, step.acoustic_BD, method="prefixes")
    # One call for both halves of guidance: with the conditioning vectors, and with zeros instead.
    prefix_R2D = jnp.concatenate([prefix_B2D, jnp.zeros_like(prefix_B2D)])
    cond_RPC = jnp.concatenate([step.cond_BPC] * 2)

    def velocities(x_BPC, t_B, dt_B):
        x_RPC, t_R, dt_R = (jnp.concatenate([y, y]) for y in (x_BPC, t_B, dt_B))
        v_RPC = model.apply({"params": params}, x_RPC, prefix_R2D, cond_RPC, t_R, dt_R, method="velocity")
        return jnp.split(v_RPC, 2)

    patch_BPC = flow.sample(
        velocities, noise_BPC, num_steps=num_steps, cfg_value=cfg_value, mean_mode=config.dit_config.dit_mean_mode
    )
    logits_B2 = model.apply({"params": params}, step.semantic_BD, method="stop_logits")
    return patch_BPC, jnp.argmax(logits_B2, axis=-1) == 1


def read_patch(params, config: ModelConfig, step: Step, patch_BPC) -> Step:
    """Feeds one patch into the next slot of every row."""
    model = VoxCPM2(config, Compute(is_unrolled=True))
    e_B1D = model.apply({"params": params}, patch_BPC, method="encode_patches")[:, None]
    S = step.cache.base_lm[0].k_BSKH.shape[1]
    mask_B1S = (jnp.arange(S)[None] <= step.length_B[:, None])[:, None]
    is_audio_B1 = jnp.ones((len(e_B1D), 1), bool)
    hidden = model.apply(
        {"params": params},
        jnp.zeros_like(e_B1D), e_B1D, is_audio_B1, step.length_B[:, None], mask_B1S, step.cache, step.length_B,
        method="read",
    )  # fmt: skip
    return Step(hidden.semantic_BTD[:, 0], hidden.acoustic_BTD[:, 0], patch_BPC, step.length_B + 1, hidden.cache)
