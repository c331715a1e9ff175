"""What a CKPT argument names: a training workdir, one step of it, a released directory, or nothing of these."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.states import State, assert_equal
from voxcpm2_jax.checkpoint.manager import Checkpoints
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.workdir import kind, load_params


@pytest.fixture
def state():
    params = {"layers": {"q": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones((3,), jnp.bfloat16)}}}
    return State(jnp.int32(7), params, (), jax.tree.map(lambda x: x * 2, params))


def test_load_params_prefers_averaged_weights(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    checkpoints.save(1, dataclasses.replace(state, ema=None), {"config": {"n": 1}})
    checkpoints.save(2, state, {"config": {"n": 2}})
    checkpoints.close()
    config, params, step = load_params(tmp_path)
    assert (config, step) == ({"n": 2}, 2)
    assert_equal(params, jax.tree.map(np.asarray, state.ema))
    config, params, step = load_params(checkpoints.directory / "1")
    assert (config, step) == ({"n": 1}, 1)
    assert_equal(params, jax.tree.map(np.asarray, state.params))
    assert isinstance(params["layers"]["q"]["bias"], np.ndarray)


def test_kind_tells_checkpoints_apart(tmp_path, state):
    run, released = tmp_path / "run", tmp_path / "released"
    checkpoints = Checkpoints(run, keep=2, every_steps=1)
    checkpoints.open()
    with pytest.raises(UserError, match="without a complete checkpoint"):
        kind(run)
    checkpoints.save(1, state, {"config": {}})
    checkpoints.close()
    assert kind(run) == kind(run / "checkpoints" / "1") == "training"
    released.mkdir()
    with pytest.raises(UserError, match="not a checkpoint"):
        kind(released)
    (released / "config.json").write_text(json.dumps({"architecture": "voxcpm2"}))
    (released / "model.safetensors").write_bytes(b"")
    assert kind(str(released)) == "released"
    with pytest.raises(UserError, match="released PyTorch directory"):
        load_params(released)
    with pytest.raises(UserError, match="no such directory"):
        kind(tmp_path / "nothing")
    with pytest.raises(UserError, match="a file"):
        kind(released / "config.json")
