"""The blocks: remat policies change no value, only what is kept; gradients of weights are summed in float32."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax import sharding
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.run import REMAT_POLICIES
from voxcpm2_jax.models.attention import find_segments
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.product import Weight, product, two_products
from voxcpm2_jax.models.transformer import Linear, run_layers

CONFIG = MODELS["tiny"].tslm


class Stack(nn.Module):
    remat: str

    @nn.compact
    def __call__(self, x_BTD, segment_BT):
        position_BT = jnp.arange(x_BTD.shape[1])[None]
        return run_layers(CONFIG, Compute(self.remat), x_BTD, position_BT, find_segments(segment_BT, 4))[0]


def gradients(remat, params, x_BTD, segment_BT):
    def total(params, x_BTD):
        return jnp.sum(Stack(remat).apply(params, x_BTD, segment_BT) ** 2)

    return jax.value_and_grad(total, (0, 1))(params, x_BTD)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(2, 24, CONFIG.width)).astype(np.float32)
    segment_BT = np.repeat([[1] * 10 + [2] * 14], 2, axis=0)
    shapes = jax.eval_shape(lambda: Stack("full").init(jax.random.key(0), x_BTD, segment_BT))
    params = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32) * 0.2, shapes)
    return params, x_BTD, segment_BT


def num_products(jaxpr):
    """Matrix products of a program, those of a scan's body counted once."""
    inner = [value for eqn in jaxpr.eqns for value in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(value)]
    return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(
        num_products(getattr(value, "jaxpr", value)) for value in inner
    )


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def test_remat_changes_no_value(problem):
    runs = {remat: jax.jit(partial(gradients, remat))(*problem) for remat in REMAT_POLICIES}
    for remat in REMAT_POLICIES:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), runs[remat], runs["none"])


def test_each_policy_keeps_more_and_computes_less(problem):
    """A layer has eight products forward (gate and up are one, two are attention's) and sixteen backward. To keep half of a
    product spares nothing; on TPU gate and up are two."""
    products = {}
    for remat in REMAT_POLICIES:
        jaxpr = jax.make_jaxpr(partial(gradients, remat))(*problem)
        products[remat] = num_products(jaxpr.jaxpr)
    assert products == {"full": 24 + 7, "thin": 24 + 6, "gate": 24 + 6, "narrow": 24 + 3, "products": 24 + 2, "none": 24}


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_two_products_are_each_of_them(dtype):
    """Results, and gradients of x and both matrices; with a `Weight` those of the matrices are float32."""
    rng = np.random.default_rng(0)
    x, one, two = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 16), (16, 8), (16, 8)))
    x = x if dtype is None else x.astype(dtype)

    def outcome(both):
        def total(x, *kernels):
            weights = kernels if dtype is None else [Weight.of(kernel, dtype) for kernel in kernels]
            gate, up = both(x, *weights)
            return jnp.sum(gate.astype(jnp.float32) * up.astype(jnp.float32) ** 2)

        return jax.value_and_grad(total, argnums=(0, 1, 2))(x, one, two)

    got = outcome(two_products)
    expected = outcome(lambda x, *weights: [product("ABD,DF->ABF", x, weight) for weight in weights])
    assert [leaf.dtype for leaf in jax.tree.leaves(got)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)  # in bfloat16, two gradients of x are rounded before their sum
        assert jnp.linalg.norm(a - b) <= (1e-6 if dtype is None else 0.01) * jnp.linalg.norm(b)


def test_gradients_of_a_bfloat16_layer_are_summed_over_devices_in_float32():
    """Noise, of which each device's share is as large as the sum: eight shares that were rounded would be off by 0.1 % each."""
    rng = np.random.default_rng(0)
    x_BTD, dy_BTUV = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((8, 3, 16), (8, 3, 4, 2)))
    params = {"kernel": rng.normal(size=(16, 4, 2)).astype(np.float32), "bias": np.zeros((4, 2), np.float32)}

    def backward(params, x_BTD, dy_BTUV):
        def layer(params, x_BTD):
            params = params | {"kernel": Weight.of(params["kernel"], jnp.bfloat16)}
            return Linear((4, 2)).apply({"params": params}, x_BTD)

        y_BTUV, back = jax.vjp(layer, params, x_BTD)
        assert y_BTUV.dtype == jnp.bfloat16
        return back(dy_BTUV)

    mesh = sharding.make_mesh((2, 4, 1))
    with jax.set_mesh(mesh):
        whole = jax.NamedSharding(mesh, jax.P())
        rows = sharding.batch_sharding(mesh)
        inputs = params, *(jax.device_put(x, rows) for x in (x_BTD, dy_BTUV))
        grads, dx_BTD = jax.jit(backward, out_shardings=(whole, rows))(*inputs)
    x, dy, kernel = (np.asarray(x, np.float64) for x in (x_BTD, dy_BTUV, params["kernel"]))
    np.testing.assert_allclose(grads["kernel"], np.einsum("btd,btuv->duv", x, dy), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["bias"], dy.sum(axis=(0, 1)), rtol=1e-4, atol=1e-5)
    assert grads["kernel"].dtype == jnp.float32 and dx_BTD.dtype == jnp.bfloat16
    expected = np.einsum("btuv,duv->btd", dy, kernel)
    assert np.linalg.norm(dx_BTD.astype(jnp.float32) - expected) < 0.01 * np.linalg.norm(expected)
