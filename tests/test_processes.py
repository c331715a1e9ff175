"""Runs of several real processes: the losses of one, the same batches, and resumption by another number of them."""

import json
import shutil

import numpy as np
import pytest

from tests.processes import run_processes

STEPS = 8
TRAIN = [
    "train", "--config=configs/backbone.py:tiny", f"--config.num_steps={STEPS}", "--config.log.every_steps=1",
    "--config.checkpoint.every_steps=2", "--config.checkpoint.keep=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains in a workdir on some processes -> the rows of its metrics.jsonl."""
    env = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}

    def run(workdir, num_processes):
        results = run_processes([*TRAIN, f"--workdir={workdir}"], num_processes, env=env, timeout_sec=300)
        assert [result.code for result in results] == [0] * num_processes, results
        assert json.loads(results[0].stdout.splitlines()[-1])["step"] == STEPS
        for other in results[1:]:  # what a run says, it says once
            assert "{" not in other.stdout and "step" not in other.stderr
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        return rows

    return run


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """A workdir in which one process trained, and its rows."""
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, train(workdir, 1)


def assert_same_run(rows, expected):
    for row, reference in zip(rows, expected, strict=True):
        for name in ("slots", "patches", "targets", "squares", "audio_sec"):  # sums over all that a batch holds: exact
            assert row[name] == reference[name], (row["step"], name)
        for name in ("loss", "loss_diff", "loss_stop"):
            np.testing.assert_allclose(row[name], reference[name], rtol=1e-6, err_msg=f"{name} of step {row['step']}")


def test_two_processes_train_as_one(train, alone, tmp_path):
    assert_same_run(train(tmp_path, 2), alone[1])


def test_1_2_4_1_processes_go_on_from_each_other(train, alone, tmp_path):
    """Each takes the run over at a later step than it was begun and finishes it."""
    workdir, expected = tmp_path / "run", alone[1]
    shutil.copytree(alone[0], workdir)
    for done, num_processes in ((2, 2), (4, 4), (6, 1)):
        for step in range(done + 2, STEPS + 1, 2):
            shutil.rmtree(workdir / "checkpoints" / str(step))
        assert_same_run(train(workdir, num_processes), expected)
