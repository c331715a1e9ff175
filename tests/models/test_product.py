"""Products in 8 bits: what is rounded and what is not, in the model as it is trained, and in programs for TPU."""

import dataclasses
import importlib.util
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax import sharding
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import PRODUCTS, BackboneRun, BatchConfig
from voxcpm2_jax.models import product as products_of
from voxcpm2_jax.models import voxcpm2
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.local import LocDiT
from voxcpm2_jax.models.product import Weight, product
from voxcpm2_jax.plan import compile
from voxcpm2_jax.train import backbone

CONFIG = MODELS["tiny"]
RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def distance(x, y) -> float:
    x, y = (np.asarray(one, np.float32) for one in (x, y))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@pytest.mark.parametrize(("products", "forward", "backward"), [("int8", 0.016, 0.03), ("fp8", 0.05, 0.1)])
@pytest.mark.parametrize(("equation", "inputs"), [("BTD,DUF->BTUF", (0,)), ("BTNH,NHD->BTD", (0, 1))])
def test_errors_of_rounding(equation, inputs, products, forward, backward):
    """Rows and outputs of very different sizes keep the same relative error, since each has a scale of its own."""
    x, w = normal(2, 8, *(64,) * len(inputs)), normal(*(64,) * len(inputs), *(32,) * (3 - len(inputs)))
    rows = 10.0 ** jnp.linspace(-4, 4, 8).reshape(1, 8, *(1,) * len(inputs))
    outputs = 10.0 ** jnp.linspace(-3, 3, 32).reshape(*(1,) * (w.ndim - 1), 32)

    def run(weight):
        y, derivative = jax.vjp(lambda x, w: product(equation, x, weight(w)), rows * x, outputs * w)
        of_sizes = y / rows.reshape(1, 8, *(1,) * (y.ndim - 2)) / outputs.reshape(*(1,) * (y.ndim - 1), 32)
        return of_sizes, *derivative(jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.float32))

    y, dx, dw = run(lambda w: Weight.of(w, jnp.float32))
    y_8, dx_8, dw_8 = run(lambda w: Weight.in_8_bits(w, products, inputs))
    assert 1e-3 < distance(y_8, y) < forward and 1e-3 < distance(dx_8, dx) < backward
    np.testing.assert_array_equal(dw_8, dw)  # is not rounded


def test_a_weight_gradient_is_that_of_bfloat16_products():
    x, w, dy = normal(2, 8, 32, dtype=jnp.bfloat16), normal(32, 16), normal(2, 8, 16, dtype=jnp.bfloat16)
    grads = []
    for weight in (lambda w: Weight.of(w, jnp.bfloat16), lambda w: Weight.in_8_bits(w, "int8", (0,))):
        y, derivative = jax.vjp(lambda w, weight=weight: product("BTD,DE->BTE", x, weight(w)), w)
        assert y.dtype == jnp.bfloat16
        grads += derivative(dy)
    assert grads[0].dtype == jnp.float32
    np.testing.assert_array_equal(*grads)


def test_only_matrices_of_layers_are_rounded(tiny_params):
    for config in (CONFIG, dataclasses.replace(CONFIG, dtype="bfloat16")):
        weights = voxcpm2.to_compute(tiny_params, config, "int8")
        short = {
            "/".join(key.key for key in path)
            for path, x in jax.tree_util.tree_leaves_with_path(weights, is_leaf=lambda x: isinstance(x, Weight))
            if isinstance(x, Weight) and x.is_in_8_bits
        }
        stacks = ("base_lm", "residual_lm", "feat_encoder", "feat_decoder")
        names = ("q", "k", "v", "o", "gate", "up", "down")
        assert short == {f"{stack}/layers/{name}/kernel" for stack in stacks for name in names}
    o = weights["base_lm"]["layers"]["o"]["kernel"]
    assert o.value.qvalue.shape == o.original.shape and o.value.scale.shape == (2, 1, 1, 32)  # layers, heads, in them, width
    meanflow = dataclasses.replace(CONFIG, dit_config=dataclasses.replace(CONFIG.dit_config, dit_mean_mode=True))
    weights = voxcpm2.to_compute(tiny_params, meanflow, "int8")
    assert weights["feat_decoder"] == tiny_params["feat_decoder"]  # float32, since the slope needs it


# ---- in the model ----------------------------------------------------------------------------------------------------

RUN = BackboneRun(
    model=dataclasses.replace(CONFIG, dtype="bfloat16"), remat="full", batch=BatchConfig(rows=8, slots=64, patches=40)
)


@pytest.fixture(scope="module")
def inputs(tiny_params):
    key = jax.random.key(0)
    config = RUN.model
    B, M, P, C = 8, 40, config.patch_size, config.feat_dim
    slots = jnp.arange(64, dtype=jnp.int32)[None].repeat(B, 0)
    patches = slots[:, 8 : 8 + M]
    batch = compile._batch_of(RUN)
    batch = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), batch)
    batch = dataclasses.replace(batch, position_BT=slots, slot_BM=patches, patches_BMPC=normal(B, M, P, C))
    out_proj = jax.tree.map(lambda x: x + 0.1, tiny_params["feat_decoder"]["out_proj"])
    params = tiny_params | {"feat_decoder": tiny_params["feat_decoder"] | {"out_proj": out_proj}}
    return params, batch, backbone.draw(key, RUN, batch.patches_BMPC, 0)


def gradients(products):
    run = dataclasses.replace(RUN, products=products)
    return jax.jit(lambda params, batch, draws: backbone.loss_and_grads(params, run, batch, draws, Compute.of(run))[::2])


def test_every_product_of_the_layers_is_in_8_bits(inputs):
    """Forward, recomputed and for dx, in a scan under remat: 7 kernels, of which all but `down` are recomputed."""
    text = gradients("int8").lower(*inputs).as_text()
    found = re.findall(r"stablehlo.dot_general .*: \(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>", text)
    assert len(found) == 4 * (7 + 6 + 7)
    assert "xi8>" not in gradients(None).lower(*inputs).as_text()


def test_losses_and_gradients_are_close(inputs):
    loss, grads = gradients(None)(*inputs)
    loss_8, grads_8 = gradients("int8")(*inputs)
    assert abs(loss_8 - loss) < 0.01 * loss
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads_8))
    flat, flat_8 = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(of)]) for of in (grads, grads_8))
    assert 1e-4 < distance(flat_8, flat) < 0.05


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_a_mesh_changes_nothing(inputs, shape):
    """Scales are maxima, which are exact on any mesh; sums of float32 and bfloat16 are not."""
    loss, grads = gradients("int8")(*inputs)
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh):
        params = jax.device_put(inputs[0], sharding.param_shardings(inputs[0], mesh))
        batch = sharding.global_batch(inputs[1], mesh, 8)
        got, got_grads = gradients("int8")(params, batch, inputs[2])
    assert abs(got - loss) < 2e-3 * loss
    flat, flat_got = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(of)]) for of in (grads, got_grads))
    assert distance(flat_got, flat) < 0.06  # 0.03; in bfloat16 0.02


def test_the_flat_layout_changes_nothing(tiny_params):
    """Heads side by side, as on TPU; in float32, whose attention is XLA's on every platform."""
    P, C, D = CONFIG.patch_size, CONFIG.feat_dim, CONFIG.locdit.width
    x, prefix, cond = normal(16, P, C), normal(16, 2, D), normal(16, P, C)
    times = jnp.linspace(0.1, 0.9, 16), jnp.zeros(16)

    def total(params, platform):
        params = voxcpm2.to_compute({"feat_decoder": params}, CONFIG, "int8")["feat_decoder"]
        compute = Compute(platform=platform, products="int8")
        return jnp.sum(LocDiT(CONFIG.locdit, compute).apply({"params": params}, x, prefix, cond, *times) * cond)

    out_proj = jax.tree.map(lambda x: x + 0.1, tiny_params["feat_decoder"]["out_proj"])
    params = tiny_params["feat_decoder"] | {"out_proj": out_proj}
    ours, theirs = (jax.jit(jax.value_and_grad(total), static_argnums=1)(params, name) for name in ("cpu", "tpu"))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(one, other, atol=1e-2 * np.abs(other).max())


def test_the_package_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    products_of.check_installed(None)
    for products in PRODUCTS:
        with pytest.raises(UserError, match=r"^products '\w+' need qwix: pip install 'voxcpm2-jax\[int8\]'$"):
            Compute.of(dataclasses.replace(RUN, products=products))


# ---- for TPU ---------------------------------------------------------------------------------------------------------

COMPILE = """
import re
import jax, jax.numpy as jnp
from jax.experimental import topologies
from voxcpm2_jax.models.product import Weight, product
for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[:1]
    whole = jax.NamedSharding(jax.sharding.Mesh(device, ("x",)), jax.P())
    x, w = (jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in (((1, 512, 1024), "bfloat16"), ((1024, 2048), "float32")))
    def total(x, w):
        y = product("BTD,DE->BTE", x, Weight.in_8_bits(w, "int8", (0,)))
        return jnp.sum(y.astype(jnp.float32) ** 2)
    text = jax.jit(jax.grad(total, (0, 1))).lower(x, w).compile().as_text()
    print(topology, sorted(re.findall(r" = (\\w+)\\[[\\d,]+\\]\\S* convolution", text)))
"""  # noqa: E501


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is the extra tpu")
def test_a_tpu_multiplies_8_bits():
    """y and dx are s8 x s8 -> s32, dw is bfloat16 x bfloat16 -> float32, with the TPU compiler, without a TPU."""
    command, environment = [sys.executable, "-c", COMPILE], compile.child_environment(compile.pathlib.Path.cwd())
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["['f32', 's32', 's32']"] * 3, (done.stdout, done.stderr[-2000:])
