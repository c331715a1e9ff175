"""Checkpoints: bitwise round trips onto other meshes, strictness, durability, retention, errors, telling paths apart."""

import dataclasses
import json
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from voxcpm2_jax import checkpoint
from voxcpm2_jax.checkpoint import Checkpoints
from voxcpm2_jax.config import UserError


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


@pytest.fixture
def state():
    keys = jax.random.split(jax.random.key(0), 12)
    params = {"layers": {"q": {"kernel": jax.random.normal(keys[0], (8, 16)), "bias": jnp.ones((16,), jnp.bfloat16)}}}
    # More than ten entries: "10" must not be taken for the one after "1".
    moments = tuple(jax.random.normal(k, (i + 1,)) for i, k in enumerate(keys))
    return State(jnp.int32(7), params, (optax.EmptyState(), moments), jax.tree.map(lambda x: x * 2, params))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (8, 1)])
def test_round_trip_onto_another_mesh(tmp_path, state, shape):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=5)
    checkpoints.save(7, shard(state, mesh(4, 2)), {"config": {"a": [1, None]}, "clips": 3})
    checkpoints.wait()
    restored, meta = checkpoints.restore(abstract(state, mesh(*shape)))
    checkpoints.close()
    assert_equal(restored, state)
    assert restored.params["layers"]["q"]["kernel"].sharding.mesh.devices.shape == shape
    assert meta == {"step": 7, "config": {"a": [1, None]}, "clips": 3}


def test_state_may_be_donated_while_it_is_written(tmp_path, state):
    want = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    checkpoints.save(1, state, {"config": {}})
    zeros = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    for _ in range(3):
        state = zeros(state)
    checkpoints.wait()
    assert_equal(checkpoints.restore(state)[0], want)
    checkpoints.close()


def test_restore_names_every_difference(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    checkpoints.save(1, dataclasses.replace(state, ema=None), {"config": {}})
    checkpoints.wait()
    q = {"kernel": jnp.zeros((8, 4)), "gain": jnp.zeros(3), "bias": jnp.ones((16,), jnp.float32)}
    with pytest.raises(UserError) as error:
        checkpoints.restore(dataclasses.replace(state, params={"layers": {"q": q}}, opt_state=state.opt_state[1][:11]))
    checkpoints.close()
    message = str(error.value)
    for part in (
        "missing ema/layers/q/kernel float32[8,16]",
        "missing params/layers/q/gain float32[3]",
        "params/layers/q/kernel is float32[8,16], the run needs float32[8,4]",
        "params/layers/q/bias is bfloat16[16], the run needs float32[16]",
        "extra opt_state/1/11 float32[12]",
    ):
        assert part in message
    assert "\n" not in message


def test_latest_is_only_what_is_durable_and_old_steps_go(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    assert checkpoints.latest_step() is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoints.restore(state)
    for step in (9, 10, 11):
        checkpoints.save(step, state, {"config": {}})
    checkpoints.wait()
    assert {p.name for p in checkpoints.directory.iterdir() if p.is_dir()} == {"10", "11"}
    # What a killed process leaves behind: an unfinished step has not got its number yet.
    checkpoints.close()
    (checkpoints.directory / "11").rename(checkpoints.directory / "12.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path, keep=2, every_steps=1).latest_step() == 10


def test_background_error_surfaces(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    checkpoints.check()
    state = State(jnp.int32(3), {"kernel": jax.random.normal(jax.random.key(0), (2048, 1024))}, ())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # a disk that takes no more
    try:
        checkpoints.save(3, state, {"config": {}})
        with pytest.raises(ValueError, match="Error writing"):
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.latest_step() is None


def test_load_params_prefers_averaged_weights(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    checkpoints.save(1, dataclasses.replace(state, ema=None), {"config": {"n": 1}})
    checkpoints.save(2, state, {"config": {"n": 2}})
    checkpoints.close()
    config, params, step = checkpoint.load_params(tmp_path)
    assert (config, step) == ({"n": 2}, 2)
    assert_equal(params, jax.tree.map(np.asarray, state.ema))
    config, params, step = checkpoint.load_params(checkpoints.directory / "1")
    assert (config, step) == ({"n": 1}, 1)
    assert_equal(params, jax.tree.map(np.asarray, state.params))
    assert isinstance(params["layers"]["q"]["bias"], np.ndarray)


def test_kind_tells_checkpoints_apart(tmp_path, state):
    run, released = tmp_path / "run", tmp_path / "released"
    checkpoints = Checkpoints(run, keep=2, every_steps=1)
    with pytest.raises(UserError, match="without a complete checkpoint"):
        checkpoint.kind(run)
    checkpoints.save(1, state, {"config": {}})
    checkpoints.close()
    assert checkpoint.kind(run) == checkpoint.kind(run / "checkpoints" / "1") == "training"
    released.mkdir()
    with pytest.raises(UserError, match="not a checkpoint"):
        checkpoint.kind(released)
    (released / "config.json").write_text(json.dumps({"architecture": "voxcpm2"}))
    (released / "model.safetensors").write_bytes(b"")
    assert checkpoint.kind(str(released)) == "released"
    with pytest.raises(UserError, match="released PyTorch directory"):
        checkpoint.load_params(released)
    with pytest.raises(UserError, match="no such directory"):
        checkpoint.kind(tmp_path / "nothing")
    with pytest.raises(UserError, match="a file"):
        checkpoint.kind(released / "config.json")
