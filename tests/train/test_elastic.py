"""Runs that start with fewer devices than planned."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.processes import run_processes
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun, BatchConfig, StageConfig
from voxcpm2_jax.train import elastic
from voxcpm2_jax.train.elastic import Size

RUN = BackboneRun(model=MODELS["tiny"], batch=BatchConfig(rows=64, slots=64, patches=40))
GROWING = dataclasses.replace(RUN, stages=(StageConfig(), StageConfig(first_step=5, rows_factor=1.5)))


@pytest.mark.parametrize(
    ("run", "planned", "present", "are_slices", "mesh", "accumulate"),
    [
        (RUN, Size(4, 16), Size(4, 16), True, (-1, -1, 1), 1),
        (RUN, Size(4, 16), Size(2, 8), True, (-1, -1, 1), 2),
        (RUN, Size(4, 16), Size(1, 4), True, (-1, -1, 1), 4),
        (dataclasses.replace(RUN, accumulate=2), Size(2, 8), Size(1, 4), True, (-1, -1, 1), 4),
        (dataclasses.replace(RUN, mesh=(4, 2, 2)), Size(4, 16), Size(2, 8), True, (2, 2, 2), 2),
        (RUN, Size(2, 16), Size(1, 8), False, (-1, -1, 1), 2),
        (
            dataclasses.replace(GROWING, batch=BatchConfig(rows=96, slots=64, patches=40)),
            Size(4, 16),
            Size(3, 12),
            True,
            (-1, -1, 1),
            2,
        ),
        (
            dataclasses.replace(RUN, batch=BatchConfig(rows=48, slots=64, patches=40)),
            Size(4, 16),
            Size(3, 12),
            True,
            (-1, -1, 1),
            2,
        ),
    ],
)
def test_no_device_holds_more_rows_at_once_than_planned(run, planned, present, are_slices, mesh, accumulate):
    fitted = elastic.fit(run, planned, present, are_slices=are_slices)
    assert (fitted.mesh, fitted.accumulate, fitted.batches) == (mesh, accumulate, run.batches)


@pytest.mark.parametrize(
    ("run", "present", "line"),
    [
        (RUN, Size(3, 12), "12 of 16 planned devices: a batch of 64 rows cannot be split over 12 devices .* more or fewer"),
        (dataclasses.replace(RUN, mesh=(2, 8, 1)), Size(1, 4), "of mesh .* only replica 2 can shrink, and not to that share"),
    ],
)
def test_what_cannot_be_split_is_said_in_a_line(run, present, line):
    with pytest.raises(UserError, match=line) as error:
        elastic.fit(run, Size(4, 16), present, are_slices=True)
    assert "\n" not in str(error.value)


def test_sizes_and_nonsense():
    assert elastic.sizes(RUN, Size(4, 16), are_slices=True) == [1, 2, 4]
    assert elastic.sizes(
        dataclasses.replace(RUN, batch=BatchConfig(rows=48, slots=64, patches=40)), Size(4, 16), are_slices=False
    ) == [1, 2, 3, 4]
    for text in ("4", "0x4", "4x", "4x4x4", "fourx2"):
        with pytest.raises(UserError, match=f"--planned={text}: expected slices or nodes, and devices of each"):
            elastic.parse(text)


STEPS = 6
TRAIN = [
    "train", "--config=configs/backbone.py:tiny", f"--config.num_steps={STEPS}", "--config.log.every_steps=1",
    "--config.checkpoint.every_steps=2", "--config.checkpoint.keep=4", "--planned=2x1",
]  # fmt: skip


def test_2_units_then_1_with_accumulation_then_2_equal_2_all_along(tmp_path):
    """Sums of micro-batches and of devices are added in another order, so losses agree to float32 rounding."""
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}

    def train(workdir, num):
        results = run_processes([*TRAIN, f"--workdir={workdir}"], num, env=env, timeout_sec=500)
        assert [result.code for result in results] == [0] * num, results
        return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()], results[0].stderr

    expected, _ = train(tmp_path / "whole", 2)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for done, num in ((2, 1), (4, 2)):
        for step in range(done + 2, STEPS + 1, 2):
            shutil.rmtree(tmp_path / "run/checkpoints" / str(step))
        rows, said = train(tmp_path / "run", num)
        changes = "started on 1 of 2 planned devices (1 of 2 slices or nodes): accumulate 1 -> 2; the batch is the same"
        assert (changes in said) == (num == 1)
        assert ("config differs from the checkpoint's: accumulate: " in said) == (num == 1 or done == 4)
        for row, other in zip(rows, expected, strict=True):
            assert all(row[name] == other[name] for name in ("step", "slots", "patches", "targets", "squares", "audio_sec"))
            for name in ("loss", "loss_diff", "loss_stop"):
                np.testing.assert_allclose(row[name], other[name], rtol=1e-6, err_msg=f"{name} of step {row['step']}")


def test_a_batch_that_one_process_cannot_split_is_a_mistake(tmp_path):
    argv = [*TRAIN, f"--workdir={tmp_path}", "--planned=3x1", "--config.batch.rows=9", "--config.mesh=3,1,1"]
    (result,) = run_processes(argv, 2, timeout_sec=400)[:1]
    assert result.code == 2 and result.stderr.count("error: 2 of 3 planned devices: a batch of 9 rows cannot be split") == 1
