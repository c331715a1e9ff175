"""A small train state for the tests of checkpoints, and what they do with it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from voxcpm2_jax.checkpoint import arrays
from voxcpm2_jax.train import start as run_start
from voxcpm2_jax.train.start import Start


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any = None


def mesh(data, tensor):
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def shard(tree, on):
    def spec(x):
        return PartitionSpec(*(("data", "tensor")[: x.ndim] if x.ndim == 2 else ()))

    return jax.device_put(tree, jax.tree.map(lambda x: NamedSharding(on, spec(x)), tree))


def abstract(tree, on):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), shard(tree, on))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def restore(checkpoints, state):
    """The newest complete step."""
    return arrays.restore(checkpoints.directory / str(checkpoints.latest_step()), state)


def kept(checkpoints):
    return sorted(int(p.name) for p in checkpoints.directory.iterdir() if p.name.isdigit())


def begin(checkpoints, state, config=None, **start):
    return run_start.begin(checkpoints, jax.tree.map(jnp.copy, state), config or {"n": 1}, Start(**start))
