"""States and checkpoints that several files of tests use."""

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.checkpoint.states import State, mesh, shard
from voxcpm2_jax.checkpoint.manager import Checkpoints


@pytest.fixture
def state():
    keys = jax.random.split(jax.random.key(0), 12)
    params = {"layers": {"q": {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jnp.ones((16,), jnp.bfloat16)}}}
    # More than ten entries: "10" must not be taken for the one after "1".
    moments = tuple(jax.random.normal(k, (i + 1,)) for i, k in enumerate(keys))
    return State(jnp.int32(7), params, (optax.EmptyState(), moments), jax.tree.map(lambda x: x * 2, params))


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Steps 1 and 2 of a run on eight devices, with the state of each."""
    on = mesh(4, 2)
    states = {}
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep=3, every_steps=1)
    for step in (1, 2):
        params = {"kernel": jax.random.normal(jax.random.key(step), (64, 32))}
        states[step] = shard(State(jnp.int32(step), params, {"mu": params["kernel"] * 2}), on)
        checkpoints.save(step, states[step], {"config": {"n": 1}})
    checkpoints.close()
    return workdir, states
