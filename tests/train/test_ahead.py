"""Train steps that are compiled ahead: saved, loaded for exactly the same program and devices, and otherwise compiled."""

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from voxcpm2_jax import sharding
from voxcpm2_jax.cli import main
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.plain import from_dict
from voxcpm2_jax.config.run import BackboneRun, StageConfig
from voxcpm2_jax.plan import compile
from voxcpm2_jax.train import ahead, backbone, pretrain


def parts(factor=1.5, devices=None):
    """A step that donates its state and sums over a mesh, with its state and batch."""
    mesh = sharding.make_mesh((1, -1, 1), devices=devices)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())

    def step(state, batch):
        weight = state["w"] * factor + jnp.sum(batch["x"])
        return {"w": weight}, {"loss": jnp.mean(weight)}

    jitted = jax.jit(step, donate_argnums=0, out_shardings=({"w": rows}, whole))
    state = {"w": jax.device_put(np.arange(16, dtype=np.float32), rows)}
    return jitted, state, {"x": jax.device_put(np.ones((8, 2), np.float32), rows)}


def saved(directory):
    step, state, batch = parts()
    return ahead.save(directory, ahead.lower(step, state, batch), state)


CHILD = """
import jax, sys, pathlib
from tests.train.test_ahead import parts
from voxcpm2_jax.train import ahead
step, state, batch = parts()
program = ahead.compile_step(step, state, batch, pathlib.Path(sys.argv[1]))
assert program is not step
for _ in range(3): state, metrics = program(state, batch)
print(float(metrics["loss"]))
"""


def test_another_process_loads_the_program(tmp_path, capsys):
    path = saved(tmp_path)
    step, state, batch = parts()
    for _ in range(3):
        state, metrics = step(state, batch)
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == float(metrics["loss"])
    assert f"train step loaded from {path}, not compiled" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [{"factor": 1.25}, {"devices": 4}])
def test_a_program_is_loaded_for_no_other_text_or_devices(tmp_path, capsys, change):
    saved(tmp_path)
    if "devices" in change:
        change = {"devices": jax.devices()[: change["devices"]]}
    step, state, batch = parts(**change)
    assert ahead.compile_step(step, state, batch, tmp_path) is step
    assert "no saved train step in" in capsys.readouterr().err


def test_a_damaged_file_is_reported_and_the_step_compiled(tmp_path, capsys):
    saved(tmp_path).write_bytes(b"\x80\x04torn")
    step, state, batch = parts()
    assert ahead.compile_step(step, state, batch, tmp_path) is step
    err = capsys.readouterr().err
    assert "cannot be loaded (" in err and err.count("\n") == 2


def test_without_a_saved_step_nothing_is_traced(tmp_path):
    for directory in (None, tmp_path, tmp_path / "absent"):
        assert ahead.compile_step("step", None, None, directory) == "step"


def test_what_is_compiled_ahead_is_what_the_run_asks_for(tmp_path, monkeypatch):
    """Text and devices agree for every stage; the step is a small one with the same arguments."""

    def jit_train_step(config, mesh, labels):
        def step(state, batch):
            read = sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(batch))
            return state, {"loss": read * config.batch.rows * len(labels.names)}

        layout = jax.tree.map(lambda x: x.sharding, backbone.abstract_state(config, mesh))
        return jax.jit(step, donate_argnums=0, out_shardings=(layout, layout.step))

    monkeypatch.setattr(backbone, "jit_train_step", jit_train_step)
    config = from_dict(BackboneRun, load_config("configs/backbone.py:tiny"))
    config = dataclasses.replace(config, stages=(StageConfig(), StageConfig(first_step=3, rows_factor=2.0)))
    saved = pretrain.compile_ahead(config, tmp_path, None, jax.devices())
    assert [one["rows"] for one in saved] == [8, 16]
    source = pretrain._open(config, None)
    mix = pretrain.Mix(config.seed, source.index, source.patch_sec, config.batch, config.stages)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        task = pretrain.BackboneTask(config, source, mix, mesh, compiled=tmp_path / "compiled")
        state = backbone.abstract_state(config, mesh)
        state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), state)
        for first in (0, 3, 1):
            with contextlib.closing(task.batches(first)) as batches:
                state, metrics = task.train_step(state, next(batches))
            assert np.isfinite(metrics["loss"])
    assert [type(program).__name__ for program in task._programs.values()] == ["Compiled"] * 2


def test_the_command_saves_into_a_bucket(tmp_path, monkeypatch, capsys):
    """Where the run's mirror of the workdir reads it."""
    from voxcpm2_jax.buckets import store
    from voxcpm2_jax.checkpoint import staged

    uploaded = {}

    def save_for(case, workdir, data):
        path = pathlib.Path(workdir) / "compiled/train_step-1"
        path.parent.mkdir()
        path.write_bytes(b"program")
        return [{"file": str(path), "rows": 8}]

    monkeypatch.setattr(compile, "save_for", save_for)
    monkeypatch.setattr(store, "objects", lambda url: {})
    monkeypatch.setattr(
        store, "upload", lambda url, files: uploaded.update({f"{url}/{n}": p.read_bytes() for n, p in files.items()})
    )
    argv = ["train", "--config=configs/backbone.py:tiny", "--workdir=gs://bucket/run", "--compile-for=v5e:2x4"]
    assert main.main(argv) == 0
    assert uploaded == {"gs://bucket/run/compiled/train_step-1": b"program"} and staged.is_kept_beside("compiled/train_step-1")
    (one,) = json.loads(capsys.readouterr().out)["saved"]
    assert one == {"file": "gs://bucket/run/compiled/train_step-1", "rows": 8}


def test_the_command_saves_and_stops(tmp_path, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(compile, "_in_child", lambda case, job: jobs.append((case.machine.name, job)) or {"saved": []})
    monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: name)
    argv = ["train", "--config=configs/backbone.py:tiny", f"--workdir={tmp_path}/w", "--data=D"]
    assert main.main([*argv, "--compile-for=v5e:2x4"]) == 0
    ((name, job),) = jobs
    assert name == "v5e:2x4" and job["data"] == "D" and job["workdir"] == f"{tmp_path}/w"
    assert capsys.readouterr().out == '{"saved": []}\n'
    for topology, said in (("8xh100", "only programs for TPUs"), ("v5e:4x4", "cannot be split into 16 parts")):
        assert main.main([*argv, f"--compile-for={topology}"]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr(compile.importlib.util, "find_spec", lambda name: None if name == "libtpu" else name)
    assert main.main([*argv, "--compile-for=v5e:2x4"]) == 2
    assert capsys.readouterr().err == f"error: {compile.NO_LIBTPU}\n"
