"""The TPU kernel of LocEnc and LocDiT equals XLA's attention: forward and gradients, interpreted on a CPU."""

import dataclasses
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.models import attention
from voxcpm2_jax.models.attention import Patches
from voxcpm2_jax.models.compute import Compute
from voxcpm2_jax.models.local import LocDiT
from voxcpm2_jax.models.local_attention import HEAD_DIM, Shape, fits
from voxcpm2_jax.models.rope import Rope
from voxcpm2_jax.plan.compile import CHILD_ENVIRONMENT

RNG = np.random.default_rng(0)


def some_patches(slots, num_patches, N, K, dtype):
    """q, k, v of two rows, RoPE, and weights of the outputs."""
    shapes = [(2, slots * num_patches, heads, HEAD_DIM) for heads in (N, K, K, N)]
    q, k, v, weight = (jnp.asarray(RNG.normal(size=shape), dtype) for shape in shapes)
    angle_BTH = RNG.normal(size=(1, slots, HEAD_DIM // 2))
    return q, k, v, Rope(*(jnp.asarray(1.2 * f(angle_BTH), jnp.float32) for f in (np.cos, np.sin))), weight


def outcome(run, q, k, v, weight):
    """Output, greatest logit or its bound, and the gradients of a weighted sum."""

    def total(q, k, v):
        o, greatest = run(q, k, v)
        return jnp.sum((o * weight).astype(jnp.float32)), (o, jnp.max(greatest))

    (_, (o, greatest)), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return o, greatest, *grads


@pytest.mark.parametrize(
    ("slots", "num_patches", "N", "K", "dtype", "tolerance"),
    [
        (11, 20, 4, 2, jnp.float32, 2e-6),  # LocDiT's slots; 20 patches are padded to 24
        (5, 30, 4, 2, jnp.float32, 2e-6),  # LocEnc's; 30 are padded to 48
        (7, 80, 2, 2, jnp.float32, 2e-6),  # a frame less, a query head per key/value head; whole groups, five steps
        (11, 16, 2, 1, jnp.bfloat16, 2e-2),
    ],
)
def test_the_kernel_equals_xla(slots, num_patches, N, K, dtype, tolerance):
    q, k, v, rope, weight = some_patches(slots, num_patches, N, K, dtype)
    patches = Patches(slots)
    got = outcome(lambda *x: attention._in_patches(patches, *x, rope, interpret=True), q, k, v, weight)
    expected = outcome(lambda *x: attention.attention_in_patches(*x, rope, patches, platform="cpu"), q, k, v, weight)
    for ours, xla in zip(got[:1] + got[2:], expected[:1] + expected[2:]):
        ours, xla = (np.asarray(x, np.float32) for x in (ours, xla))
        assert np.abs(ours - xla).max() < tolerance * np.abs(xla).max()
    assert 0 < got[1] <= expected[1] * 1.01, "the greatest logit is not above its bound"


def test_the_kernel_without_rope():
    q, k, v, _, weight = some_patches(5, 24, 2, 2, jnp.float32)
    got = outcome(lambda *x: attention._in_patches(Patches(5), *x, None, interpret=True), q, k, v, weight)
    expected = outcome(lambda *x: attention.attention_in_patches(*x, None, Patches(5), platform="cpu"), q, k, v, weight)
    np.testing.assert_allclose(got[0], expected[0], atol=2e-6)


@pytest.mark.parametrize(
    ("slots", "patches", "group", "step"),
    [
        (11, 5632, 88, 352),
        (5, 5632, 80, 320),
        (5, 24, 120, 120),
        (11, 24, 88, 264),
        (16, 7, 112, 112),
        (11, 1, 88, 88),
        (200, 2, 200, 400),
    ],
)
def test_groups_are_whole_patches_and_whole_tiles(slots, patches, group, step):
    shape = Shape.of(slots, 4, 2, slots * patches)
    assert (shape.group_rows, shape.step_rows) == (group, step) and group % slots == 0 and group % 8 == 0


def test_what_does_not_fit_the_fast_memory_is_left_to_xla():
    assert Shape.of(19, 16, 2, 19 * 64).step_rows < 608, "four groups would need 15 MB"
    assert fits(11, 16, 2, 128) and fits(5, 16, 2, 128) and not fits(11, 16, 2, 64) and not fits(201, 32, 2, 128)


def test_patches_do_not_see_each_other():
    q, k, v, rope, _ = some_patches(11, 16, 2, 1, jnp.float32)

    def run(v):
        return attention._in_patches(Patches(11), q, k, v, rope, interpret=True)[0]

    moved = np.abs(run(v.at[:, 11:22].add(1.0)) - run(v)).max(axis=(0, 2, 3)) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved), range(11, 22))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_flat_layout_changes_nothing(tiny_params, shape):
    """Patches side by side in rows, as on TPU; in float32, whose attention is XLA's on every platform."""
    from voxcpm2_jax import sharding

    config = MODELS["tiny"]
    P, C, D = config.patch_size, config.feat_dim, config.locdit.width
    x, prefix, cond = (jnp.asarray(RNG.normal(size=(16, *dims)), jnp.float32) for dims in ((P, C), (2, D), (P, C)))
    times = jnp.linspace(0.1, 0.9, 16), jnp.zeros(16)
    params = tiny_params["feat_decoder"] | {
        "out_proj": jax.tree.map(lambda x: x + 0.1, tiny_params["feat_decoder"]["out_proj"])
    }

    def total(params, platform):
        v_RPC = LocDiT(config.locdit, Compute(platform=platform)).apply({"params": params}, x, prefix, cond, *times)
        return jnp.sum(v_RPC * cond)

    expected = jax.jit(jax.value_and_grad(total), static_argnums=1)(params, "cpu")
    with jax.set_mesh(sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])):
        got = jax.jit(jax.value_and_grad(total), static_argnums=1)(params, "tpu")
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_a_model_with_other_heads_uses_xla():
    """The kernel wants heads of 128, which fill the lanes; tiny has 8."""
    assert MODELS["tiny"].locdit.head_dim != HEAD_DIM == MODELS["2b"].locdit.head_dim == MODELS["2b"].locenc.head_dim
    q = jnp.ones((1, 10, 2, 8), jnp.bfloat16)
    text = jax.jit(lambda q: attention.attention_in_patches(q, q, q, None, Patches(5), platform="tpu")).lower(q).as_text()
    assert not re.search("tpu_custom_call", text)
    assert dataclasses.replace(Compute(), platform="tpu").is_flat and not Compute(platform="cpu").is_flat


@pytest.mark.parametrize("K", [2, 1])
def test_the_kernel_on_a_mesh(K):
    """Rows over replica and data, heads over tensor where it divides the key/value heads."""
    from voxcpm2_jax import sharding

    q, k, v, rope, weight = some_patches(11, 8, 4, K, jnp.float32)
    q, k, v, weight = (jnp.concatenate([x, -x]) for x in (q, k, v, weight))  # four rows
    kernel = partial(attention._in_patches, Patches(11), interpret=True)
    expected = outcome(lambda *x: kernel(*x, rope), q, k, v, weight)
    with jax.set_mesh(sharding.make_mesh((2, 2, 2))):
        got = outcome(lambda *x: attention._by_device(kernel, *x, rope), q, k, v, weight)
    for ours, one_device in zip(got, expected):
        np.testing.assert_allclose(ours, one_device, atol=1e-5)


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from voxcpm2_jax.models.local_attention import patch_attention
for topology in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[:1]
    whole = jax.NamedSharding(jax.sharding.Mesh(device, ("x",)), jax.P())
    for slots, patches in ((11, 64), (5, 48), (19, 64)):
        q, k = (jax.ShapeDtypeStruct((1, slots * patches, 128 * n), jnp.bfloat16, sharding=whole) for n in (16, 2))
        table = jax.ShapeDtypeStruct((slots, 128), jnp.float32, sharding=whole)
        total = lambda q, k, v, cos, sin: jnp.sum(patch_attention(q, k, v, cos, sin)[0].astype(jnp.float32))
        text = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k, table, table).compile().as_text()
        print(topology, slots, "patch_attention_backward" in text)
"""


def test_the_kernel_compiles_for_every_tpu():
    """At the released heads, with the TPU compiler, without a TPU."""
    environment = os.environ | CHILD_ENVIRONMENT
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["True"] * 9
