"""MiniCPM-4: RMSNorm, LongRoPE, grouped-query attention and SwiGLU, in pre-norm blocks.

    x += s * o(attention(rope(q(norm x)), rope(k(norm x)), v(norm x)))        s: residual scale, 1 without muP
    x += s * down(silu(gate(norm x)) * up(norm x))

All four stacks of the model use it. Training scans over stacked layers with remat. Generation runs the layers one by one,
with q/k/v and gate/up fused (`unstack`), because a scan inside the decode loop would copy its weights.
Parameters may have any float dtype and are cast to the dtype of the activations; norms, RoPE and softmax use float32.
Pass `mutable=["figures"]` to `apply` to also get the maxima of each layer; otherwise they cost nothing.

Source: MiniCPM-4 report; LongRoPE (arXiv 2402.13753).
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.lax import optimization_barrier as barrier

from voxcpm2_jax.config.model import TransformerConfig
from voxcpm2_jax.config.run import REMAT_POLICIES
from voxcpm2_jax.models.attention import Patches, attention, attention_in_patches, logit_bound
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.product import Weight, product, two_products
from voxcpm2_jax.models.rope import rope_table, rotate
from voxcpm2_jax.sharding import constrain, mesh_in_use, spec


def fan_in(num_in: int, num_out: int) -> nn.initializers.Initializer:
    """Initialiser with variance 1 / (size of the first `num_in` dims), for a kernel whose other `num_out` dims are outputs."""
    axes = tuple(range(num_in)), tuple(range(num_in, num_in + num_out))
    return nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", *axes)


def row_major(x_BTD: jax.Array) -> jax.Array:
    """Keeps a row's positions in the order of its dims. Left to itself, the TPU compiler transposes the residual stream, and
    copies what kernels read and write from one order to the other."""
    mesh = mesh_in_use()
    layout = partial(with_layout_constraint, layouts=Layout(tuple(range(x_BTD.ndim))))
    if mesh.empty:
        return layout(x_BTD)
    # On each device by itself: where the compiler splits a program, it gathers what has a layout of its own.
    rows = spec(x_BTD.shape, ("batch", None, None), mesh)
    return jax.shard_map(layout, in_specs=rows, out_specs=rows)(x_BTD)


class Kernel(nn.Module):
    """Only the matrix of a `Linear`, for a product that uses several matrices at once."""

    shape: tuple[int, int]

    @nn.compact
    def __call__(self) -> jax.Array | Weight:
        return self.param("kernel", fan_in(1, 1), self.shape)


class Linear(nn.Module):
    """`x @ kernel + bias` over the last `num_in` dims of x.

    `is_flat` multiplies matrices, with heads and what is in them side by side: the layout that TPU kernels read and write.
    """

    features: tuple[int, ...]
    num_in: int = 1
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer | None = None
    is_flat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows, in_dims = x.shape[: -self.num_in], x.shape[-self.num_in :]
        init = self.kernel_init or fan_in(self.num_in, len(self.features))
        kernel = self.param("kernel", init, in_dims + self.features)
        dims = "ABC"[: len(rows)]
        if self.is_flat:
            # The barrier also stands before the gradient's way back to the kernel's shape. Without it the compiler transposes
            # the gradients of activations, in order to get the kernel's gradient in the kernel's own order.
            kernel_DE = jax.tree.map(lambda x: barrier(x.reshape(math.prod(x.shape[: self.num_in]), -1)), kernel)
            y = product(f"{dims}D,DE->{dims}E", x.reshape(*rows, -1), kernel_DE).reshape(*rows, *self.features)
        else:
            contract, out = "XYZ"[: self.num_in], "UVW"[: len(self.features)]
            y = product(f"{dims}{contract},{contract}{out}->{dims}{out}", x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            bias = bias.astype(jnp.float32).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
            y = (y.astype(jnp.float32) + bias).astype(x.dtype)  # in float32, so that the gradient of the bias is too
        return y


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def largest(x_BTD: jax.Array) -> jax.Array:
    """[B] float32: the largest magnitude in each row; a figure, without gradient.

    Per row and not per batch, because a maximum over all devices would be a collective in every layer.
    """
    return jnp.max(jnp.abs(jax.lax.stop_gradient(x_BTD)), axis=(1, 2)).astype(jnp.float32)


class KV(NamedTuple):
    """The cached keys and values of one layer."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array

    def write(self, k_BTKH: jax.Array, v_BTKH: jax.Array, start_B: jax.Array) -> "KV":
        """Writes T new slots into each row, from slot `start_B` on."""
        put = jax.vmap(lambda old, new, start: jax.lax.dynamic_update_slice(old, new, (start, 0, 0)))
        return KV(put(self.k_BSKH, k_BTKH, start_B), put(self.v_BSKH, v_BTKH, start_B))


def empty_cache(config: TransformerConfig, batch: int, num_slots: int, dtype) -> tuple[KV, ...]:
    """One KV of zeros per layer."""
    shape = (batch, num_slots, config.num_kv_heads, config.head_dim)
    return tuple(KV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


class Block(nn.Module):
    """One layer. With a cache, it writes keys and values from slot `start_B` on and attends to the whole cache."""

    config: TransformerConfig
    compute: Compute = Compute()  # unrolled layers have one q/k/v and one gate/up matrix

    @nn.compact
    def __call__(self, x_BTD, rope, sees, cache=None, start_B=None):
        c = self.config
        x_BTD = row_major(x_BTD) if self.compute.is_flat else x_BTD
        N, K, H, F = c.num_heads, c.num_kv_heads, c.head_dim, c.mlp_width

        def linear(name, *features, num_in=1):
            return Linear(features, num_in, use_bias=False, is_flat=self.compute.is_flat, name=name)

        with jax.named_scope("attention"):
            y_BTD = RMSNorm(c.rms_norm_eps, name="attn_norm")(x_BTD)
            if self.compute.is_unrolled:
                q, k, v = jnp.split(linear("qkv", N + 2 * K, H)(y_BTD), [N, N + K], axis=2)
            else:
                q, k, v = linear("q", N, H)(y_BTD), linear("k", K, H)(y_BTD), linear("v", K, H)(y_BTD)
            if isinstance(sees, Patches):
                q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
                o_BTNH, bound = attention_in_patches(q, k, v, rope, sees, platform=self.compute.platform)
            else:
                if rope is not None:
                    q, k = rotate(q, rope), rotate(k, rope)
                bound = logit_bound(q, k)
                if cache is not None:
                    cache = cache.write(k, v, start_B)
                    k, v = cache
                q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
                o_BTNH = attention(q, k, v, sees, window=self.compute.clip_slots, platform=self.compute.platform)
            self.sow("figures", "logit_bound_max", bound)
            y_BTD = checkpoint_name(linear("o", c.width, num_in=2)(o_BTNH), "o")
            x_BTD += y_BTD * jnp.asarray(c.residual_scale, x_BTD.dtype)
        with jax.named_scope("mlp"):
            y_BTD = RMSNorm(c.rms_norm_eps, name="mlp_norm")(x_BTD)
            if self.compute.is_unrolled:
                gate_up_BT2F = linear("gate_up", 2, F)(y_BTD)
                gate, up = gate_up_BT2F[:, :, 0], gate_up_BT2F[:, :, 1]
            else:
                gate, up = (Kernel((c.width, F), name=name)() for name in ("gate", "up"))
                is_kept = "gate" in (REMAT_POLICIES[self.compute.remat] or ())
                if self.compute.products is not None or (self.compute.is_flat and is_kept):
                    gate, up = two_products(y_BTD, gate, up)
                else:
                    # One product reads x once, and its gradient is one product too. The two matrices are stacked on an axis
                    # of their own, so that their split over devices stays as it is. Fusing q/k/v in the same way does not
                    # reduce the bytes moved (tests/measure_kernels.py).
                    kernel_D2F = jax.tree.map(lambda *kernels: jnp.stack(kernels, axis=1), gate, up)
                    gate_up_BT2F = product("BTD,DUF->BTUF", y_BTD, kernel_D2F)
                    gate, up = gate_up_BT2F[:, :, 0], gate_up_BT2F[:, :, 1]
            gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
            h_BTF = constrain(nn.silu(gate) * up, "batch", None, "mlp")
            x_BTD += linear("down", c.width)(h_BTF) * jnp.asarray(c.residual_scale, x_BTD.dtype)
        x_BTD = row_major(x_BTD) if self.compute.is_flat else x_BTD
        self.sow("figures", "activation_max", largest(x_BTD))
        return constrain(x_BTD, "batch", None, None), cache


def run_layers(config: TransformerConfig, compute: Compute, x_BTD, position_BT, sees, cache=None, start_B=None):
    """All blocks of a stack and its last norm, as parameters `layers` and `norm` of the calling compact module.

    Args:
        compute: if `is_unrolled`, parameters are `layers_0`, `layers_1` .. with fused matrices (`unstack`); a cache needs it.
        position_BT: for RoPE; of one patch, [1, slots], if `sees` is Patches.
        sees: as in `attention`; with a cache it is a mask over the S slots of the cache; or Patches.
        cache: one KV per layer, written from slot `start_B` of each row on.
    Returns:
        y_BTD and the new cache (None if there was none).
    """
    rope = rope_table(config, position_BT)
    if compute.is_unrolled:
        layers = []
        for i in range(config.num_layers):
            x_BTD, layer = Block(config, compute, name=f"layers_{i}")(
                x_BTD, rope, sees, None if cache is None else cache[i], start_B
            )
            layers.append(layer)
        cache = None if cache is None else tuple(layers)
    else:
        assert cache is None, "a cache needs unrolled layers"
        block, kept = Block, REMAT_POLICIES[compute.remat]
        if kept is not None:
            block = nn.remat(Block, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*kept))
        stacked = nn.scan(
            block,
            variable_axes={"params": 0, "figures": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
        )
        x_BTD, _ = stacked(config, compute, name="layers")(x_BTD, rope, sees)
    return RMSNorm(config.rms_norm_eps, name="norm")(x_BTD), cache


FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # kernel of the unrolled form: those that it is made of


def fuse(name: str, kernels, xp=jnp):
    """A kernel of one layer of the unrolled form, from the kernels that FUSED names.

    Args:
        xp: numpy or jax.numpy.
    """
    return {"qkv": xp.concatenate, "gate_up": xp.stack}[name](kernels, axis=1)


def unstack(stack: dict) -> dict:
    """Parameters of a stack -> parameters of its unrolled form: `layers_i` with fused q/k/v and gate/up."""

    def unrolled(layer: dict) -> dict:
        parts = {part for parts in FUSED.values() for part in parts}
        fused = {name: {"kernel": fuse(name, [layer[part]["kernel"] for part in parts])} for name, parts in FUSED.items()}
        return {name: of for name, of in layer.items() if name not in parts} | fused

    layers = stack["layers"]
    num_layers = layers["o"]["kernel"].shape[0]
    rest = {k: v for k, v in stack.items() if k != "layers"}
    return rest | {f"layers_{i}": unrolled(jax.tree.map(lambda x, i=i: x[i], layers)) for i in range(num_layers)}
