"""The codec's convolutions against XLA's own, whole and in chunks, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax.vae.conv import Conv, DownConv, Snake, UpConv, depthwise, snake

LAYERS = {
    "dense": Conv(4, 7, 3),
    "depthwise": Conv(3, 7, 9, is_depthwise=True),
    "pointwise": Conv(5, 1),
    "down": DownConv(4, 3),
    "down by 1": DownConv(4, 1),
    "up": UpConv(2, 3),
    "up by 1": UpConv(2, 1),
}


@partial(jax.jit, static_argnums=0)
def _apply(layer, params, x_BAE, left_BAE=None):
    return layer.apply(params, x_BAE, left_BAE)


@partial(jax.jit, static_argnums=0)
def _vjp(f, g, *args):
    y, back = jax.vjp(f, *args)
    return y, back(g)


def _normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _params(layer, x_BAE):
    """Away from their initial values: a gain of one is the kernel's own norm, a bias is zero."""
    params = jax.jit(layer.init)(jax.random.key(0), x_BAE)
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [np.asarray(p) + 0.3 * np.asarray(_normal(i, *p.shape)) for i, p in enumerate(leaves)])


def _folded(params, gain_dim):
    p = jax.tree.map(np.asarray, params["params"])
    dims = tuple(d for d in range(3) if d != gain_dim)
    norm = np.sqrt(np.sum(p["kernel"] ** 2, dims, keepdims=True))
    return p["kernel"] / norm * p["gain"].reshape(norm.shape), p["bias"]


@pytest.mark.parametrize("name", LAYERS)
def test_chunks_equal_the_whole(name):
    layer = LAYERS[name]
    x_BAE = _normal(1, 2, 18, 3)
    params = _params(layer, x_BAE)
    whole, whole_left = _apply(layer, params, x_BAE)
    for chunks in ((3, 15), (9, 3, 3, 3), (3, 3, 3, 3, 3, 3)):
        left, parts = None, []
        for chunk in jnp.split(x_BAE, np.cumsum(chunks)[:-1], axis=1):
            y, left = _apply(layer, params, chunk, left)
            parts.append(y)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(left, whole_left)


@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_sees_the_future(name):
    layer = LAYERS[name]
    x_BAE = _normal(2, 1, 18, 3)
    params = _params(layer, x_BAE)
    y, _ = _apply(layer, params, x_BAE)
    changed, _ = _apply(layer, params, x_BAE.at[:, 12:].add(1.0))
    same = 12 * y.shape[1] // 18
    np.testing.assert_allclose(changed[:, :same], y[:, :same], atol=1e-6)
    assert abs(changed[:, same:] - y[:, same:]).max() > 1e-2


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_down_is_a_strided_convolution_padded_left_by_its_stride(stride):
    x_BAE, layer = _normal(3, 2, 6 * stride, 3), DownConv(4, stride)
    params = _params(layer, x_BAE)
    kernel_WIO, bias_E = _folded(params, 2)
    expected = jax.lax.conv_general_dilated(
        x_BAE, kernel_WIO, (stride,), [(stride, 0)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(_apply(layer, params, x_BAE)[0], np.asarray(expected) + bias_E, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_trap_11_up_is_a_transposed_convolution_trimmed_right_with_gains_per_input_channel(stride):
    x_BTE, layer = _normal(4, 2, 6, 3), UpConv(4, stride)
    params = _params(layer, x_BTE)
    assert params["params"]["gain"].shape == (3,)
    kernel_WIO, bias_E = _folded(params, 1)
    expected = np.zeros((2, 7 * stride, 4))
    for t in range(6):
        expected[:, t * stride : (t + 2) * stride] += np.einsum("bi,wio->bwo", x_BTE[:, t], kernel_WIO)
    expected = expected[:, : 6 * stride] + bias_E
    np.testing.assert_allclose(_apply(layer, params, x_BTE)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 9])
def test_depthwise_and_its_gradients_are_those_of_a_grouped_convolution(dilation):
    x_BAE, kernel_WE, g_BAE = _normal(5, 2, 70, 4), _normal(6, 7, 4), _normal(7, 2, 70 - 6 * dilation, 4)

    def grouped(x_BAE, kernel_WE):
        return jax.lax.conv_general_dilated(
            x_BAE, kernel_WE[:, None], (1,), "VALID", rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=4,
        )  # fmt: skip

    ours, our_grads = _vjp(lambda x, k: depthwise(x, k, dilation), g_BAE, x_BAE, kernel_WE)
    theirs, their_grads = _vjp(grouped, g_BAE, x_BAE, kernel_WE)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, other in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_snake_and_its_gradients_are_those_of_the_formula():
    alpha_E = jnp.array([0.3, 1.0, 2.5, -1.5])
    x_BAE, g_BAE = 20 * _normal(8, 2, 500, 4), _normal(9, 2, 500, 4)

    def formula(x_BAE, alpha_E):
        alpha_E = alpha_E[None, None]
        return x_BAE + jnp.sin(alpha_E * x_BAE) ** 2 / (alpha_E + 1e-9)

    ours, (dx, dalpha) = _vjp(snake, g_BAE, x_BAE, alpha_E)
    theirs, (dx_formula, dalpha_formula) = _vjp(formula, g_BAE, x_BAE, alpha_E)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(dx, dx_formula, atol=1e-5)
    np.testing.assert_allclose(dalpha, dalpha_formula, rtol=1e-5, atol=1e-2)


def test_snake_keeps_the_sine_exact_far_from_zero():
    x_BAE = jnp.linspace(-1e4, 1e4, 100_001, dtype=jnp.float32)[None, :, None]
    exact = np.asarray(x_BAE, np.float64) + np.sin(np.asarray(x_BAE, np.float64)) ** 2
    y_BAE = jax.jit(Snake().apply)({"params": {"alpha": jnp.ones(1)}}, x_BAE)
    assert np.abs(np.asarray(y_BAE, np.float64) - exact).max() < 1e-3  # half a unit in the last place of 1e4


def test_bias_gradient_is_the_sum_over_rows_and_time():
    x_BAE, layer = _normal(10, 2, 6, 3), Conv(4, 1)
    params = _params(layer, x_BAE)
    g_BAE = _normal(11, 2, 6, 4)
    _, (grads,) = _vjp(lambda p: layer.apply(p, x_BAE)[0], g_BAE, params)
    np.testing.assert_allclose(grads["params"]["bias"], g_BAE.sum((0, 1)), rtol=1e-5, atol=1e-5)
