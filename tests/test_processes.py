"""Runs of several real processes: the losses of one, the same batches, and resumption by another number of them."""

import json
import shutil
import signal

import numpy as np
import pytest

from tests.processes import run_processes

STEPS = 8
TRAIN = [
    "train", "--config=configs/backbone.py:tiny", f"--config.num_steps={STEPS}", "--config.log.every_steps=1",
    "--config.checkpoint.every_steps=2", "--config.checkpoint.keep=4",
]  # fmt: skip


ROWS = """
import jax, json, numpy as np
from jax.experimental.multihost_utils import process_allgather
from voxcpm2_jax import processes, sharding

processes.connect()
assert processes.from_each("n" * jax.process_index()) == ["", "n", "nn", "nnn"]
whole_BT = np.arange(24).reshape(8, 3)
found = []
for shape, order in ((1, 4, 1), "0123"), ((2, 2, 1), "2031"), ((1, 2, 2), "0123"), ((1, 2, 2), "3012"):
    devices = np.array(jax.devices())[list(map(int, order))].reshape(shape)
    mesh = jax.sharding.Mesh(devices, sharding.MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    rows = sharding.local_rows(mesh, 8)
    batch_BT = sharding.global_batch(whole_BT[rows], mesh, 8)
    assert batch_BT.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
    np.testing.assert_array_equal(process_allgather(batch_BT, tiled=True), whole_BT)
    found.append(rows)
print(json.dumps(found))
"""


def test_rows_of_a_process_follow_its_devices():
    """Devices in another order than processes, and rows that two processes share since tensor crosses them."""
    results = run_processes([], 4, program=("-c", ROWS))
    assert [result.code for result in results] == [0] * 4, results
    in_order, shuffled, shared, shared_shuffled = zip(*(json.loads(r.stdout.splitlines()[-1]) for r in results))
    assert in_order == ([0, 1], [2, 3], [4, 5], [6, 7])
    assert shuffled == ([2, 3], [6, 7], [0, 1], [4, 5])
    assert shared == ([0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7])
    assert shared_shuffled == ([0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [0, 1, 2, 3])


def test_processes_that_are_told_nonsense_say_so_in_a_line():
    results = run_processes([*TRAIN, "--workdir=run"], 1, env={"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"})
    assert results[0].code == 2 and results[0].stderr.startswith("error: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,")
    assert results[0].stderr.count("\n") == 1 and not results[0].stdout


LEAVE = """
import sys
import jax, numpy as np
from jax.experimental.multihost_utils import process_allgather
from voxcpm2_jax.cli.training import run_training
from voxcpm2_jax.config.plain import UserError

def train(workdir):
    process_allgather(np.zeros(1))
    if str(jax.process_index()) in sys.argv[1]:
        raise UserError("this clip is damaged")
    process_allgather(np.zeros(1))

sys.exit(run_training(sys.argv[2], train))
"""


@pytest.mark.parametrize("leaving", ["0", "1", "01"])
def test_a_mistake_that_some_process_finds_ends_all_of_them(leaving, tmp_path):
    """Soon, and with the code by which a launcher knows not to start them again; the others fail."""
    results = run_processes([leaving, str(tmp_path)], 2, program=("-c", LEAVE), timeout_sec=60)
    for i, result in enumerate(results):
        # JAX itself aborts a process that finds the first one gone before its collective does.
        assert result.code in ((2,) if str(i) in leaving else (1, -signal.SIGABRT)), results
        assert (result.stderr == "error: this clip is damaged\n") == (str(i) in leaving), results


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
