"""A run that is stuck says where, once, and leaves if it has several processes or is told to."""

import signal
import subprocess
import sys
import time

import pytest

from tests.processes import run_processes
from tests.train.test_loop import Toy
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import WatchdogConfig
from voxcpm2_jax.train.watchdog import Watchdog

QUICK = WatchdogConfig(factor=2.0, min_sec=0.2, slow_sec=60.0)


def sleepy(toy, sec):
    """Batches, of which number 8 takes its time."""

    def batches(start):
        for step, batch in enumerate(toy.batches(start), start):
            if step == 8:
                time.sleep(sec)
            yield batch

    return batches


def test_a_stalled_wait_for_data_is_reported_once_with_every_thread(tmp_path, capsys):
    toy = Toy(1)
    state, _ = toy.run(tmp_path, 12, batches=sleepy(toy, 1.0), watchdog=QUICK)
    assert int(state.step) == 12
    said = capsys.readouterr().err
    assert said.count("stuck: ") == 1 and "stuck: waiting for batch 8 for 0." in said
    assert "thread MainThread:" in said and "time.sleep(sec)" in said  # the very line


def test_a_run_that_moves_is_left_alone(tmp_path, capsys):
    """Compiling, saving and evaluating take longer than any step; they are none."""
    toy = Toy(1)

    def slow_step(state, batch):
        if int(state.step) == 0:
            time.sleep(0.5)
        return toy.train_step(state, batch)

    toy.run(tmp_path, 5, train_step=slow_step, watchdog=QUICK)
    assert "stuck" not in capsys.readouterr().err


def test_the_limit_is_a_multiple_of_the_median_step_and_never_below_the_least():
    dog = Watchdog(WatchdogConfig(factor=3.0, min_sec=0.03, slow_sec=9.0))
    assert dog.limit_sec == 9.0  # nothing is known yet
    for sec in (0.02, 0.02, 0.02, 0.2, 0.001):
        dog.waiting(0)
        dog.stepping(1, is_compiling=False)
        time.sleep(sec)
        dog.stepped()
    assert 0.06 < dog.limit_sec < 0.15
    for _ in range(9):
        dog.waiting(0)
        dog.stepping(1, is_compiling=False)
        dog.stepped()
    assert dog.limit_sec == 0.03


_STUCK = """
import time
from voxcpm2_jax.config.run import WatchdogConfig
from voxcpm2_jax.train.watchdog import Watchdog
with Watchdog(WatchdogConfig(factor=2.0, min_sec=0.2, slow_sec=0.3, action="exit")) as dog:
    dog.slow("evaluating step 3")
    time.sleep(60)
"""


def test_with_action_exit_the_process_ends_for_the_launcher_to_start_it_again():
    done = subprocess.run([sys.executable, "-c", _STUCK], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "stuck: evaluating step 3 for" in done.stderr and "leaving with code 1 " in done.stderr


_HUNG = """
import time
import jax, numpy as np
from jax.experimental.multihost_utils import process_allgather
from voxcpm2_jax import processes
from voxcpm2_jax.config.run import WatchdogConfig
from voxcpm2_jax.train.watchdog import Watchdog
processes.LOST_SEC = 10
processes.connect()
process_allgather(np.zeros(1))
with Watchdog(WatchdogConfig(factor=2.0, min_sec=0.2, slow_sec=2.0)) as dog:
    dog.slow("evaluating step 3")
    if jax.process_index() == 1:
        time.sleep(30)  # a disk that does not answer
    process_allgather(np.zeros(1))
"""


def test_several_processes_leave_by_default_one_reports():
    """One of two hangs, the other waits for it: both are gone soon, with codes on which a launcher starts them again."""
    results = run_processes([], 2, program=("-c", _HUNG), timeout_sec=60)
    # The other fails as it finds the connection closed, or JAX aborts it when it has missed heartbeats for LOST_SEC.
    assert {result.code for result in results} <= {1, -signal.SIGABRT}, results
    said = "".join(result.stderr for result in results)
    assert "stuck: evaluating step 3 for" in said and "one of 2 processes: leaving with code 1 " in said
    (alone,) = run_processes([], 1, program=("-c", _HUNG.replace("_index() == 1", "_index() == 0").replace("(30)", "(3)")))
    assert alone.code == 0 and "stuck: " in alone.stderr and "watchdog.action=exit" in alone.stderr


def test_watchdog_config_says_what_is_wrong():
    with pytest.raises(UserError, match=r"watchdog.action: expected report, exit or None, got 'stop'"):
        WatchdogConfig(action="stop")
