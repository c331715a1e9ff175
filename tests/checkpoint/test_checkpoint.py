"""Checkpoints: bitwise round trips onto other meshes, strictness, durability, retention, errors, telling paths apart."""

import dataclasses
import json
import pathlib
import re
import resource
import shutil
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from voxcpm2_jax import sharding
from voxcpm2_jax.checkpoint import arrays, integrity, steps
from voxcpm2_jax.checkpoint.manager import Checkpoints, SaveFailed
from voxcpm2_jax.config.model import MODELS, AudioVAEConfig
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import CHANGES, FREE, SCHEDULE, BackboneRun, BatchConfig, OptimConfig, VAERun
from voxcpm2_jax.train import backbone
from voxcpm2_jax.train import start as run_start
from voxcpm2_jax.train.start import Start, _changes, _check_changes
from voxcpm2_jax.train.state import fresh_state
from voxcpm2_jax.workdir import kind, load_params


def restore(checkpoints, state):
    """The newest complete step."""
    return arrays.restore(checkpoints.directory / str(checkpoints.latest_step()), state)



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


def test_what_is_remembered_is_that_of_the_moment(tmp_path, state):
    """Not of when it comes to be written: the loop goes on counting in the very objects that it handed over."""
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
    # What a killed process leaves behind: an unfinished step has not got its number yet.
    checkpoints.close()
    (checkpoints.directory / "11").rename(checkpoints.directory / "12.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path, keep=2, every_steps=1).latest_step() == 10


def test_a_full_disk_stops_the_run_and_harms_nothing_older(tmp_path, capsys):
    """The error of a background save surfaces by itself; the next start clears away what the save left."""
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
    assert [p.name for p in checkpoints.directory.iterdir()] == ["2"] and meta["step"] == 2
    checkpoints.save(3, state, {"config": {}})
    checkpoints.close()
    assert checkpoints.verified_step() == 3


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


# ---- what stays ------------------------------------------------------------------------------------------------------


def kept(checkpoints):
    return sorted(int(p.name) for p in checkpoints.directory.iterdir() if p.name.isdigit())


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
    # What was best before a restart still is; then something else is better.
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


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
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


def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    return Checkpoints(tmp_path / "run", keep=3, every_steps=1)


def begin(checkpoints, state, config=None, **start):
    return run_start.begin(checkpoints, jax.tree.map(jnp.copy, state), config or {"n": 1}, Start(**start))


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def foreign(path):
    path.with_name("foreign").write_bytes(b"1")


# One file of each kind that a step has.
KINDS = (
    "params/manifest.ocdbt", "params/d/*", "params/ocdbt.process_0/d/*", "params/ocdbt.process_0/manifest.ocdbt",
    "opt_state/_METADATA", "params/_sharding", "params/array_metadatas/process_0", "step/manifest.ocdbt", "meta/metadata",
    integrity.CHECKSUMS_FILE,
)  # fmt: skip


def test_every_kind_of_file_is_damaged_below(saved):
    files = [p.relative_to(saved[0] / "checkpoints" / "2") for p in (saved[0] / "checkpoints" / "2").rglob("*") if p.is_file()]
    others = [f for f in files if not any(f.match(k) or f.match(f"*/{k.split('/', 1)[-1]}") for k in KINDS)]
    assert {f.name for f in others} == {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, truncate, flip, foreign])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, tmp_path, capsys, kind, damage):
    checkpoints = copy(saved, tmp_path)
    step = checkpoints.directory / "2"
    file = sorted(step.glob(kind))[-1]
    damage(file)
    with pytest.raises(UserError, match=r"/2: damaged checkpoint: .*; use another step: 1$"):
        integrity.verify(tmp_path / "run")
    state, meta = begin(checkpoints, saved[1][2])
    assert_equal(state, saved[1][1])
    assert meta["step"] == 1
    damaged, aside, line = capsys.readouterr().err.splitlines()
    name = file.with_name("foreign") if damage is foreign else file
    # Of an altered list of checksums, it may be a file in it that no longer fits.
    named = "" if kind == integrity.CHECKSUMS_FILE and damage is flip else f"{name.relative_to(step)} "
    assert damaged.startswith(f"DAMAGED CHECKPOINT {step}: {named}")
    assert aside == f"skipped and renamed to {checkpoints.directory}/2.damaged"
    assert line == f"starting from step 1 of {tmp_path / 'run'} (resume)"
    # The run comes to step 2 again.
    checkpoints.save(2, state, {"config": {}})
    checkpoints.close()
    assert checkpoints.verified_step() == 2 and (checkpoints.directory / "2.damaged").is_dir()


def test_no_whole_checkpoint_left_is_no_fresh_start(saved, tmp_path, capsys):
    checkpoints = copy(saved, tmp_path)
    for step in (1, 2):
        truncate(checkpoints.directory / str(step) / "params" / "manifest.ocdbt")
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint is damaged \(2, 1\)"):
            begin(checkpoints, saved[1][2])
    checkpoints.close()


@pytest.mark.parametrize("name", ["3", "notes", "4.bak"])
def test_a_foreign_directory_among_the_checkpoints(saved, tmp_path, capsys, name):
    shutil.copytree(saved[0], tmp_path / "run")
    directory = tmp_path / "run" / "checkpoints" / name
    directory.mkdir()
    (directory / "file").write_text("mine")
    checkpoints = Checkpoints(tmp_path / "run", keep=3, every_steps=1)
    _, meta = begin(checkpoints, saved[1][2])
    assert meta["step"] == 2
    checkpoints.save(3, saved[1][2], {"config": {}})
    checkpoints.close()
    assert kept(checkpoints) == [1, 2, 3]
    said = capsys.readouterr().err
    if name == "3":
        assert f"DAMAGED CHECKPOINT {directory}: it has neither checksums.json nor meta/" in said
    else:
        assert "DAMAGED" not in said and (directory / "file").read_text() == "mine"


def test_a_step_of_an_earlier_version_is_read_and_said_not_to_be_verified(saved, tmp_path, capsys):
    checkpoints = copy(saved, tmp_path)
    for step in (1, 2):
        path = checkpoints.directory / str(step)
        (path / integrity.CHECKSUMS_FILE).unlink()
        (path / "meta" / "metadata").write_text(json.dumps({"step": step, "config": {"n": 1}}))
    state, _ = begin(checkpoints, saved[1][2])
    checkpoints.close()
    assert_equal(state, saved[1][2])
    assert "(resume), not verified: an earlier version saved it without checksums" in capsys.readouterr().err
    assert load_params(tmp_path / "run")[2] == 2


def test_readers_refuse_damaged_weights_alone(saved, tmp_path):
    checkpoints = copy(saved, tmp_path)
    checkpoints.close()
    flip(checkpoints.directory / "2" / "opt_state" / "manifest.ocdbt")
    assert_equal(load_params(tmp_path / "run")[1], jax.tree.map(np.asarray, saved[1][2].params))
    flip(next((checkpoints.directory / "2" / "params" / "ocdbt.process_0" / "d").iterdir()))
    for read in (load_params, arrays.array_specs):
        with pytest.raises(UserError, match=r"damaged checkpoint: params/ocdbt.process_0/d/\w+ was altered"):
            read(tmp_path / "run")


# ---- where a run starts ----------------------------------------------------------------------------------------------


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
    assert capsys.readouterr().err.splitlines() == [
        "starting from scratch (seed 3)",
        f"starting from step 2 of {trunk} (--resume-from)",
        f"starting from step 1 of {trunk} (--resume-from)",
        f"starting from step 5 of {tmp_path / 'run'} (resume; --resume-from={trunk} is not used)",
    ]
    assert {p: p.stat().st_mtime_ns for p in trunk.rglob("*")} == before, "the trunk was touched"
    with pytest.raises(UserError, match="no such directory"):
        begin(Checkpoints(tmp_path / "other", keep=3, every_steps=1), saved[1][2], resume_from=tmp_path / "nothing")


TINY = BackboneRun(model=MODELS["tiny"], batch=BatchConfig(slots=128, patches=80))


def run_config(**changes):
    return to_dict(dataclasses.replace(TINY, **changes)) | {"data": {"codec_sha256": "a"}}


@pytest.mark.parametrize("is_branch", [False, True])
def test_changed_config(saved, tmp_path, capsys, is_branch):
    old = run_config()
    new = run_config(seed=1, num_steps=7, mesh=(2, 2, 2)) | {"data": {"codec_sha256": "b"}, "added": 3}
    new["optim"]["learning_rate"], new["optim"]["beta1"], new["batch"]["rows"] = 1.0, 0.5, 4
    changed = {"seed", "num_steps", "mesh", "data.codec_sha256", "added", "optim.learning_rate", "optim.beta1", "batch.rows"}
    assert {field for field, _ in _changes(old, new)} == changed
    check = {"old": old, "new": new, "is_branch": is_branch}
    with pytest.raises(UserError) as error:
        _check_changes("CKPT", start=Start(rules=CHANGES), **check)
    refused = {"seed", "data.codec_sha256", "optim.beta1", "batch.rows"} | (
        {"optim.learning_rate"} - {"optim.learning_rate" * is_branch}
    )
    for field in changed:
        assert (f"{field}: " in str(error.value)) == (field in refused)
    assert "seed: 0 -> 1 (order of the data, noise of every update)" in str(error.value)
    assert "add --accept-config-changes" in str(error.value) and capsys.readouterr().err == ""
    _check_changes("CKPT", start=Start(rules=CHANGES, accept_changes=True), **check)
    said = capsys.readouterr().err
    assert all(f"checkpoint's: {field}: " in said for field in changed) and "added: (none) -> 3" in said
    _check_changes("CKPT", start=Start(), **check)


@pytest.mark.parametrize("accept_changes", [False, True])
@pytest.mark.parametrize(
    "path, value",
    [("guard.window", 64), ("optim.mu_dtype", "bfloat16"), ("optim.optimizer", "muon"), ("optim.ema_decay", 0.9)],
)
def test_what_the_saved_arrays_hang_on_cannot_be_accepted_away(path, value, accept_changes):
    """Restoring would fail anyway, so that no flag is offered; and each of them does change the arrays."""
    group, name = path.split(".")
    changed = dataclasses.replace(TINY, **{group: dataclasses.replace(getattr(TINY, group), **{name: value})})
    shapes = [jax.tree.leaves(jax.eval_shape(partial(backbone.init_state, run))) for run in (TINY, changed)]
    assert [(x.shape, x.dtype) for x in shapes[0]] != [(x.shape, x.dtype) for x in shapes[1]]
    start = Start(rules=CHANGES, accept_changes=accept_changes)
    for old, new in ((TINY, changed), (changed, TINY)):
        with pytest.raises(UserError, match=f"{path}: .* set it back, or start in a new workdir$"):
            _check_changes("CKPT", to_dict(old), to_dict(new), start, is_branch=True)


def test_a_decay_may_change_when_told_to():
    runs = [to_dict(dataclasses.replace(TINY, optim=OptimConfig(ema_decay=decay))) for decay in (0.9, 0.99)]
    with pytest.raises(UserError, match="or add --accept-config-changes"):
        _check_changes("CKPT", *runs, Start(rules=CHANGES), is_branch=False)
    _check_changes("CKPT", *runs, Start(rules=CHANGES, accept_changes=True), is_branch=False)


def test_every_field_of_a_run_has_a_rule():
    """Who adds a field decides whether it may change under a checkpoint."""
    for run in (TINY, VAERun(vae=AudioVAEConfig())):
        flat = arrays.flatten(dataclasses.asdict(run))
        for field in {path.replace("/", ".") for path in flat} | set(vars(run)):
            assert any(re.match(pattern, field) for pattern, *_ in CHANGES), field
    kinds = {field: kind for field in ("num_steps", "optim.schedule") for p, kind, _ in CHANGES if re.match(p, field)}
    assert kinds["num_steps"] == FREE and SCHEDULE in {kind for _, kind, _ in CHANGES}
