"""Real processes of a toy run, of which one is slow: it has to be named, and none without a fault."""

import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest

from tests.processes import run_processes, start_processes
from voxcpm2_jax.train import peers

STEPS, SLOW_SEC = 30, 0.2
TOY = """
import dataclasses, sys, time, types
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from voxcpm2_jax import processes
from voxcpm2_jax.config.run import CheckpointConfig, GuardConfig, LogConfig, WatchdogConfig
from voxcpm2_jax.train import loop, peers

workdir, fault, victim, num_steps, slow_sec = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5]), float(sys.argv[5])
processes.connect()
is_victim = jax.process_index() == victim
mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
split, copied = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: object
    params: object

@jax.jit
def update(state, x_BD):  # tens of milliseconds
    params = jax.lax.fori_loop(0, 30, lambda _, y_DD: jnp.cos(y_DD @ y_DD) + x_BD.mean(), state.params)
    return State(state.step + 1, params), {"loss": params.mean(), "audio_sec": jnp.float32(1)}

class Task(loop.Task):
    run = types.SimpleNamespace(
        num_steps=num_steps, log=LogConfig(every_steps=3), checkpoint=CheckpointConfig(every_steps=6, keep=1),
        guard=GuardConfig(), watchdog=WatchdogConfig(),
    )
    record = {}
    newest = None

    def batches(self, start):
        while True:
            if is_victim and fault == "data":
                jax.block_until_ready(self.newest)  # so that its devices run dry, however slow they are
                time.sleep(slow_sec)
            x_BD = np.ones((1, 8), np.float32)
            yield jax.make_array_from_process_local_data(split, x_BD, (jax.process_count(), 8))

    def train_step(self, state, batch):
        if is_victim and fault == "host":
            jax.block_until_ready(self.newest)
            end = time.perf_counter() + slow_sec
            while time.perf_counter() < end:
                pass
        state, figures = update(state, batch)
        self.newest = figures["loss"]
        return state, figures

if fault == "device":
    jax.default_backend = lambda: "any"
    peers._product_sec = lambda: 0.020 if is_victim else 0.010
loop.run(Task(), jax.device_put(State(jnp.int32(0), jnp.ones((256, 256))), copied), workdir)
"""


WARNING = re.compile(r"^process (\d+) of (\d+) on (\S+) slows the run down by at most (\d+)% of a step: (.*)$", re.M)


def warnings(result):
    return WARNING.findall(result.stderr)


def rows(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(("fault", "victim"), [("data", 1), ("data", 0), ("host", 1), ("device", 1)])
def test_a_slow_process_is_named_with_what_it_is_slow_at(fault, victim, tmp_path):
    results = run_processes([tmp_path, fault, victim, STEPS, SLOW_SEC], 2, program=("-c", TOY), timeout_sec=400)
    assert [result.code for result in results] == [0, 0], results
    ((process, num, host, share, what),) = warnings(results[0])
    assert (int(process), int(num), host) == (victim, 2, os.uname().nodename) and int(share) > 10
    assert peers.PARTS[fault] in what and not warnings(results[1])
    found = [row for row in rows(tmp_path) if "slowest" in row]
    named = [row for row in found if (row["slowest"], row["slowest_at"], row["slowest_host"]) == (victim, fault, host)]
    assert len(named) >= 3
    if fault != "device":
        assert len(found) == STEPS // 3
        assert np.median([row["slowest_sec"] for row in named]) > 0.5 * SLOW_SEC  # steps around a save count as none
        assert all(0 < row[f"spread_sec/{fault}"] <= row["slowest_sec"] for row in named)


def test_a_process_that_is_stopped_again_and_again_is_named(tmp_path):
    """Wherever its main thread is, which is mostly where it waits for its devices."""
    done = threading.Event()
    with start_processes([tmp_path, "none", 0, 3 * STEPS, 0], 2, program=("-c", TOY)) as started:

        def stop_often():
            while not done.wait(0.15):
                started[1].popen.send_signal(signal.SIGSTOP)
                time.sleep(0.15)
                started[1].popen.send_signal(signal.SIGCONT)

        while not rows(tmp_path):
            assert started[0].popen.poll() is None, started[0].stderr
            time.sleep(0.02)
        thread = threading.Thread(target=stop_often)
        thread.start()
        results = [process.wait(400) for process in started]
        done.set()
        thread.join()
    assert [result.code for result in results] == [0, 0], results
    found = warnings(results[0])
    assert found and all(int(process) == 1 and peers.PARTS["pause"] in what for process, *_, what in found)


def test_no_process_is_named_without_a_fault(tmp_path):
    results = run_processes([tmp_path, "none", 0, 3 * STEPS, 0], 4, program=("-c", TOY), timeout_sec=400)
    assert [result.code for result in results] == [0] * 4, results
    assert not warnings(results[0]), results[0].stderr
    assert sum("slowest" in row for row in rows(tmp_path)) == 3 * STEPS // 3
