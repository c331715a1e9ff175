"""Saves and restores: bitwise onto other meshes, strict, durable; which steps are kept, and where a run starts."""

import dataclasses
import resource
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.checkpoint.states import State, abstract, assert_equal, begin, kept, mesh, restore, shard
from voxcpm2_jax import sharding
from voxcpm2_jax.checkpoint import arrays, steps
from voxcpm2_jax.checkpoint.manager import Checkpoints, SaveFailed
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import OptimConfig
from voxcpm2_jax.train.state import fresh_state


@pytest.mark.parametrize("shape", [(2, 4), (1, 1), (8, 1)])
def test_round_trip_onto_another_mesh(tmp_path, state, shape):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=5)
    checkpoints.save(7, shard(state, mesh(4, 2)), {"config": {"a": [1, None]}, "clips": 3})
    checkpoints.wait()
    restored, meta = restore(checkpoints, abstract(state, mesh(*shape)))
    checkpoints.close()
    assert_equal(restored, state)
    assert restored.params["layers"]["q"]["kernel"].sharding.mesh.devices.shape == shape
    assert meta.pop("versions")["jax"] == jax.__version__
    assert meta == {"step": 7, "config": {"a": [1, None]}, "clips": 3, "figures": {}}


def test_train_state_goes_onto_any_mesh_and_is_read_array_by_array(tmp_path, tiny_params):
    """As FSDP over eight devices writes it; every device of another mesh gets exactly its part."""
    on = sharding.make_mesh((1, 8, 1))
    shapes = jax.eval_shape(partial(fresh_state, OptimConfig(ema_decay=0.9), 10), tiny_params)
    draw = np.random.default_rng(0)
    state = jax.tree.map(lambda x: (100 * draw.random(x.shape)).astype(x.dtype), shapes)
    checkpoints = Checkpoints(tmp_path, keep=1, every_steps=1)
    checkpoints.save(1, jax.device_put(state, sharding.param_shardings(state, on)), {"config": {}})
    checkpoints.wait()
    for shape, num in (((2, 2, 2), 8), ((1, 4, 2), 8), ((1, 1, 1), 1)):
        other = sharding.make_mesh(shape, jax.devices()[:num])
        layout = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, sharding.param_shardings(state, other)
        )
        restored, _ = restore(checkpoints, layout)
        assert_equal(restored, state)
        assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, restored, layout))
    checkpoints.close()
    flat = arrays.flatten(state.ema)
    assert arrays.array_specs(tmp_path).keys() == flat.keys()
    for path, array in flat.items():
        read = arrays.read_array(tmp_path, path)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, np.asarray(array))


def test_state_may_be_donated_while_it_is_written(tmp_path, state):
    want = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    checkpoints.save(1, state, {"config": {}})
    zeros = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    for _ in range(3):
        state = zeros(state)
    checkpoints.wait()
    assert_equal(restore(checkpoints, state)[0], want)
    checkpoints.close()


def test_meta_is_copied_when_save_is_called(tmp_path, state):
    """The loop goes on changing the objects that it passed, while they are written in the background."""
    checkpoints = Checkpoints(tmp_path, keep=1, every_steps=1)
    meta = {"config": {}, "meter": {"loss": [1.0, 1.0]}}
    checkpoints.save(7, state, meta)
    meta["meter"]["loss"] = [9.0, 2.0]
    checkpoints.wait()
    checkpoints.close()
    assert steps.read_meta(tmp_path / "checkpoints" / "7")["meter"] == {"loss": [1.0, 1.0]}


def test_restore_names_every_difference(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    checkpoints.save(1, dataclasses.replace(state, ema=None), {"config": {}})
    checkpoints.wait()
    q = {"kernel": jnp.zeros((8, 4)), "gain": jnp.zeros(3), "bias": jnp.ones((16,), jnp.float32)}
    with pytest.raises(UserError) as error:
        restore(checkpoints, dataclasses.replace(state, params={"layers": {"q": q}}, opt_state=state.opt_state[1][:11]))
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
    for step in (9, 10, 11):
        checkpoints.save(step, state, {"config": {}})
    checkpoints.wait()
    assert {p.name for p in checkpoints.directory.iterdir() if p.is_dir()} == {"10", "11"}
    # What a killed process leaves behind: an unfinished step, which has no number yet.
    checkpoints.close()
    (checkpoints.directory / "11").rename(checkpoints.directory / "12.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path, keep=2, every_steps=1).latest_step() == 10


def test_a_full_disk_stops_the_run_and_harms_nothing_older(tmp_path, capsys):
    """The error of a background save is raised by `check`; the next start removes what the save left."""
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    checkpoints.check()
    state = State(jnp.int32(3), {"kernel": jax.random.normal(jax.random.key(0), (2048, 1024))}, ())
    checkpoints.save(2, state, {"config": {}})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # a disk that takes no more
    what = r"step 3 could not be saved in .*checkpoints \(.* GB free\): .*Error writing.*; step 2 is whole; remove the cause"
    try:
        checkpoints.save(3, state, {"config": {}})
        with pytest.raises(SaveFailed, match=what):
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)
        checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoints.latest_step() == 2 and len(list(checkpoints.directory.iterdir())) == 2
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    begun, meta = begin(checkpoints, state, {})
    assert_equal(begun, state)
    assert meta["step"] == 2
    for _ in range(1000):  # Orbax removes what is left of step 3 in the background
        if [p.name for p in checkpoints.directory.iterdir()] == ["2"]:
            break
        time.sleep(0.01)
    assert [p.name for p in checkpoints.directory.iterdir()] == ["2"]
    checkpoints.save(3, state, {"config": {}})
    checkpoints.close()
    assert checkpoints.verified_step() == 3


def test_last_every_kth_and_best_stay(tmp_path, capsys):
    state = State(jnp.int32(0), {"kernel": jnp.ones(3)}, ())
    rules = {"keep": 1, "every_steps": 1, "keep_every_steps": 3, "best_metric": "val_loss"}
    checkpoints = Checkpoints(tmp_path, **rules)
    for step, loss in ((1, 3.0), (2, np.float32(1.0)), (3, 2.0), (4, None)):
        checkpoints.save(step, state, {"config": {}}, {} if loss is None else {"val_loss": loss, "sound": "no number"})
    checkpoints.close()
    assert kept(checkpoints) == [2, 3, 4]
    assert "best_metric val_loss was not measured at step 4 (measured: nothing)" in capsys.readouterr().err
    assert steps.read_meta(checkpoints.directory / "2")["figures"] == {"val_loss": 1.0}
    # The best step before a restart is kept until another one is better.
    checkpoints = Checkpoints(tmp_path, **rules)
    checkpoints.save(5, state, {"config": {}}, {"val_loss": 1.5})
    checkpoints.wait()
    assert kept(checkpoints) == [2, 3, 5]
    checkpoints.save(6, state, {"config": {}}, {"val_loss": jnp.float32(0.5)})
    checkpoints.wait()
    assert kept(checkpoints) == [3, 6]
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, **rules | {"best_mode": "max"})
    checkpoints.save(7, state, {"config": {}}, {"val_loss": 0.1})
    checkpoints.close()
    assert kept(checkpoints) == [3, 6, 7] and "best_metric" not in capsys.readouterr().err


def test_order_of_starting_points(saved, tmp_path, capsys):
    trunk, step_1 = saved[0], saved[0] / "checkpoints" / "1"
    before = {p: p.stat().st_mtime_ns for p in trunk.rglob("*")}
    checkpoints = Checkpoints(tmp_path / "run", keep=3, every_steps=1)
    state, meta = begin(checkpoints, saved[1][2], fresh="scratch (seed 3)")
    assert meta == {}
    for path, number in ((trunk, 2), (step_1, 1)):
        state, meta = begin(checkpoints, saved[1][2], resume_from=path)
        assert_equal(state, saved[1][number])
    checkpoints.save(5, state, {"config": {"n": 1}})
    checkpoints.wait()
    state, meta = begin(checkpoints, saved[1][2], resume_from=trunk)
    checkpoints.close()
    assert meta["step"] == 5
    *said, saved_line, last = capsys.readouterr().err.splitlines()
    assert saved_line.startswith("step 5 is saved: ") and [*said, last] == [
        "starting from scratch (seed 3)",
        f"starting from step 2 of {trunk} (--resume-from)",
        f"starting from step 1 of {trunk} (--resume-from)",
        f"starting from step 5 of {tmp_path / 'run'} (resume; --resume-from={trunk} is not used)",
    ]
    assert {p: p.stat().st_mtime_ns for p in trunk.rglob("*")} == before, "the trunk was touched"
    with pytest.raises(UserError, match="no such directory"):
        begin(Checkpoints(tmp_path / "other", keep=3, every_steps=1), saved[1][2], resume_from=tmp_path / "nothing")
