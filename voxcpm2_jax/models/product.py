"""Matrix products, and where the gradient of a weight is rounded: nowhere.

A device multiplies bfloat16 copies of the weights, but its gradients of the weights stay in float32, as the product
accumulates them, until they have been summed over all devices and micro-batches. The derivative of a cast would round each
device's share to bfloat16 and XLA would sum these shares in bfloat16, which on noise-like gradients is off by
0.17 % x sqrt(n / 2) for n devices in a ring: 1.9 % for 256.

    Weight(value: bfloat16, original: float32)     y = x value,   d original = x' dy in float32,   d value is not used

In 8 bits (`Weight.in_8_bits`), a product rounds what it multiplies: activations with a scale for each row, weights with one for
each output, and in the backward pass dy times the weights' scales, again with a scale for each row:

    y = s_x s_w (x / s_x) (w / s_w)                dx = s_g (g / s_g) (w / s_w)',  g = dy s_w

The gradient of the weight stays a product of bfloat16. It sums over all positions, whose number is many times the width, so
that rounding it to 8 bits would cost most where it is least needed, and its scales would be maxima over all devices.

Source: SwitchBack, arXiv 2304.13013; here weights have a scale for each output and not one for the whole matrix. Rounding and
products are Qwix's (`quantize`, `dot_general`). Its own training mode is not used: it finds weights by replacing functions of
JAX while the model is traced, and its gradients of the weights have the dtype of the activations.
"""

import importlib.util
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from voxcpm2_jax.config.plain import UserError

# 8-bit products: the dtype of activations and weights, and that of gradients, whose range is wider.
EIGHT_BITS = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}


def einsum(equation: str, x: jax.Array, y: jax.Array, dtype=None) -> jax.Array:
    """`jnp.einsum` that multiplies float32 in full float32 precision on every platform; dtype: of the result, if another."""
    return jnp.einsum(equation, x, y, precision="highest" if x.dtype == jnp.float32 else None, preferred_element_type=dtype)


class Weight(NamedTuple):
    """A matrix in the compute dtype, and the parameter that its gradient goes to. Either has the same shape."""

    value: Any  # array, or in 8 bits a qwix.QArray: an array and the scales of its outputs
    original: jax.Array

    @classmethod
    def of(cls, original: jax.Array, dtype) -> "Weight":
        return cls(jax.lax.stop_gradient(original).astype(dtype), original)

    @classmethod
    def in_8_bits(cls, original: jax.Array, products: str, inputs: tuple[int, ...]) -> "Weight":
        """For 8-bit products.

        Args:
            products: a name in EIGHT_BITS.   inputs: the dims that a product sums over.
        """
        outputs = [dim for dim in range(original.ndim) if dim not in inputs]
        return cls(_round(jax.lax.stop_gradient(original), EIGHT_BITS[products][0], outputs), original)

    @property
    def is_in_8_bits(self) -> bool:
        return hasattr(self.value, "qvalue")


def check_installed(products: str | None) -> None:
    """Raises UserError if these products need a package that is not installed."""
    if products is not None and importlib.util.find_spec("qwix") is None:
        raise UserError(f"products {products!r} need qwix: pip install 'voxcpm2-jax[int8]'")


def product(equation: str, x: jax.Array, weight: Weight | jax.Array) -> jax.Array:
    """`einsum` of activations and a weight, in the dtype of the activations. Letters only: no ellipsis."""
    if not isinstance(weight, Weight):
        return einsum(equation, x, weight.astype(x.dtype))
    if weight.is_in_8_bits:
        return _product_in_8_bits(equation, x, *weight)
    return _product(equation, x, weight.value.astype(x.dtype), weight.original)


def two_products(x_ABD: jax.Array, one: Weight | jax.Array, two: Weight | jax.Array) -> tuple[jax.Array, jax.Array]:
    """x one, x two, both [A, B, F].

    Going forward they are two products: on TPU, a product can write its result to where it is kept for the backward pass, but
    not each half of its result. Going back they are one. In 8 bits they are two: a TPU rounds arrays whose last dim but one is
    2 at a fraction of its speed.
    """
    if not isinstance(one, Weight) or one.is_in_8_bits:
        return tuple(product("ABD,DF->ABF", x_ABD, weight) for weight in (one, two))
    return _two_products(x_ABD, one.value.astype(x_ABD.dtype), two.value.astype(x_ABD.dtype), one.original, two.original)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(equation, x, value, original):
    return einsum(equation, x, value)


def _forward(equation, x, value, original):
    return einsum(equation, x, value), (x, value)


def _backward(equation, saved, dy):
    x, value = saved
    of_x, of_weight, of_y = equation.replace("->", ",").split(",")
    dx = einsum(f"{of_y},{of_weight}->{of_x}", dy, value)
    return dx, jnp.zeros_like(value), _gradient_of_weight(equation, x, dy)


_product.defvjp(_forward, _backward)


@jax.custom_vjp
def _two_products(x, one, two, one_original, two_original):
    return tuple(einsum("ABD,DF->ABF", x, value) for value in (one, two))


def _two_forward(x, one, two, *originals):
    return _two_products(x, one, two, *originals), (x, one, two)


def _two_backward(saved, dys):
    x, one, two = saved
    dy, both = jnp.stack(dys, axis=2), jnp.stack([one, two], axis=1)
    of_both = einsum("ABD,ABUF->DUF", x, dy, dtype=jnp.float32)
    dx = einsum("ABUF,DUF->ABD", dy, both)
    return dx, jnp.zeros_like(one), jnp.zeros_like(two), of_both[:, 0], of_both[:, 1]


_two_products.defvjp(_two_forward, _two_backward)


def _gradient_of_weight(equation, x, dy):
    of_x, of_weight, of_y = equation.replace("->", ",").split(",")
    return einsum(f"{of_x},{of_y}->{of_weight}", x, dy, dtype=jnp.float32)


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product_in_8_bits(equation, x, value, original):
    of_x, of_weight, _ = equation.replace("->", ",").split(",")
    return _multiply(of_x, of_weight, x, value, value.qtype).astype(x.dtype)


def _forward_in_8_bits(equation, x, value, original):
    return _product_in_8_bits(equation, x, value, original), (x, value)


def _backward_in_8_bits(equation, saved, dy):
    x, value = saved
    of_x, of_weight, of_y = equation.replace("->", ",").split(",")
    (of_gradients,) = (gradients for dtype, gradients in EIGHT_BITS.values() if dtype == value.qtype)
    outputs = value.scale.shape[sum(letter in of_x for letter in of_weight) :]
    g = dy.astype(jnp.float32) * value.scale.reshape((1,) * (dy.ndim - len(outputs)) + outputs)
    dx = _multiply(of_y, of_weight, g, value.qvalue, of_gradients).astype(x.dtype)
    return dx, None, _gradient_of_weight(equation, x, dy)


_product_in_8_bits.defvjp(_forward_in_8_bits, _backward_in_8_bits)


def _multiply(of_x: str, of_weight: str, x, weight, dtype) -> jax.Array:
    """x rounded to 8 bits, times a weight in 8 bits, summed over the letters that both have; float32.

    The result has x's other dims, then the weight's.
    """
    import qwix

    rows = [dim for dim, letter in enumerate(of_x) if letter not in of_weight]
    summed = [dim for dim in range(x.ndim) if dim not in rows]
    dims = (tuple(summed), tuple(of_weight.index(of_x[dim]) for dim in summed)), ((), ())
    with jax.numpy_dtype_promotion("standard"):  # Qwix multiplies int32 by float32
        return qwix.dot_general(_round(x.astype(jnp.float32), dtype, rows), weight, dims, preferred_element_type=jnp.float32)


def _round(x: jax.Array, dtype, dims: list[int]):
    """x in 8 bits, with a scale for every index of these dims: its largest magnitude becomes the dtype's."""
    import qwix

    return qwix.quantize(x, dtype, channelwise_axes=dims)
