"""The blocks: remat policies change no value, only what is kept and what is computed again."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.run import REMAT_POLICIES
from voxcpm2_jax.models.attention import find_segments
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.transformer import run_layers

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
    """A layer has eight products forward (gate and up are one, two are attention's) and sixteen backward."""
    products = {}
    for remat in REMAT_POLICIES:
        jaxpr = jax.make_jaxpr(partial(gradients, remat))(*problem)
        products[remat] = num_products(jaxpr.jaxpr)
    assert products == {"full": 24 + 7, "narrow": 24 + 3, "products": 24 + 2, "none": 24}
