"""The two local stacks, bidirectional within one patch: LocEnc (patch -> vector) and LocDiT (noisy patch -> velocity).

    LocEnc   [special, P frames]                                                  -> output of the first slot
    LocDiT   [lm, residual, time, P frames of the patch before, P noisy frames]   -> outputs of the last P slots

Here a row (dim R) is one patch and not a row of the batch: all patches of a batch, tens of thousands, are computed at once.

Source: VoxCPM2 report, sections on LocEnc and LocDiT. Differs from the PyTorch package: time stays in float32.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from voxcpm2_jax import sharding
from voxcpm2_jax.config.model import TransformerConfig
from voxcpm2_jax.models.attention import Patches
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.transformer import Linear, run_layers

TIME_SCALE = 1000.0


def _run(config: TransformerConfig, compute: Compute, x_RTD: jax.Array) -> jax.Array:
    """All layers.

    If the layout is flat, patches stand side by side in one row per device. A TPU would store 11 slots as 16, and move
    them between every two operations that want them in another order.
    """
    R, T, D = x_RTD.shape
    rows = sharding.num_shards("batch", R) if compute.is_flat else R
    x_BTD = sharding.constrain(x_RTD.reshape(rows, R // rows * T, D), "batch", None, None)
    y_BTD, _ = run_layers(config, compute, x_BTD, jnp.arange(T)[None], Patches(T))
    return y_BTD.reshape(R, T, D)


class LocEnc(nn.Module):
    """One vector per patch of latents."""

    config: TransformerConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x_RPC: jax.Array) -> jax.Array:
        width = self.config.width
        special_D = self.param("special_token", nn.initializers.normal(1.0), (width,))
        x_RPD = Linear((width,), name="in_proj")(x_RPC)
        special_R1D = jnp.broadcast_to(special_D[None, None], (len(x_RPD), 1, width)).astype(x_RPD.dtype)
        x_RTD = jnp.concatenate([special_R1D, x_RPD], axis=1)
        y_RTD = _run(self.config, self.compute, x_RTD)
        return y_RTD[:, 0]


def time_embedding(t_R: jax.Array, width: int) -> jax.Array:
    """Sines, then cosines, of 1000 t at `width / 2` frequencies from 1 down to 1e-4; float32."""
    half = width // 2
    # Angles reach 1000 radians, where the last bit of a frequency changes the sine: so frequencies are correctly rounded.
    exponent = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / (half - 1))
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = TIME_SCALE * t_R.astype(jnp.float32)[:, None] * frequency[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class TimeMLP(nn.Module):
    @nn.compact
    def __call__(self, x_RD: jax.Array) -> jax.Array:
        width = x_RD.shape[-1]
        return Linear((width,), name="linear_2")(nn.silu(Linear((width,), name="linear_1")(x_RD)))


class LocDiT(nn.Module):
    """Velocity of noisy latent patches, conditioned on two prefix tokens and the previous patch.

    Args:
        x_RPC: noisy latents at time t.   prefix_R2D: [lm, residual], concatenated, not summed.
        cond_RPC: previous clean patch; zeros in a segment's first slot.   t_R: time in [0, 1]; 1 is noise.
        dt_R: t - r in mean mode; otherwise zeros, which still go through their MLP.
    Returns:
        v_RPC: d(latent)/dt, float32.
    """

    config: TransformerConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x_RPC, prefix_R2D, cond_RPC, t_R, dt_R):
        width, dtype = self.config.width, prefix_R2D.dtype
        P, C = x_RPC.shape[1:]
        time_RD = TimeMLP(name="time_mlp")(time_embedding(t_R, width).astype(dtype))
        time_RD += TimeMLP(name="delta_time_mlp")(time_embedding(dt_R, width).astype(dtype))
        cond_RPD = Linear((width,), name="cond_proj")(cond_RPC.astype(dtype))
        x_RPD = Linear((width,), name="in_proj")(x_RPC.astype(dtype))
        x_RTD = jnp.concatenate([prefix_R2D, time_RD[:, None], cond_RPD, x_RPD], axis=1)
        y_RTD = _run(self.config, self.compute, x_RTD)
        v_RPC = Linear((C,), name="out_proj", kernel_init=nn.initializers.zeros)(y_RTD[:, -P:])
        return v_RPC.astype(jnp.float32)
