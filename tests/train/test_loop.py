"""The loop on a toy model: exact resume on one and on eight devices, signals, broken steps, what is logged when."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from voxcpm2_jax import optim
from voxcpm2_jax.checkpoint import manager, steps
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import CheckpointConfig, GuardConfig, LogConfig, OptimConfig, WatchdogConfig
from voxcpm2_jax.train import guard, loop, signals

OPTIM = OptimConfig(learning_rate=0.1, warmup_steps=2, schedule_steps=20, ema_decay=0.9)
GUARD = GuardConfig(window=4, spike=12.0, max_in_a_row=3, max_rollbacks=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    guard: Any


class Toy:
    """Fits a matrix to noise. `faults` tells what the first row of a batch is, instead of noise of size 1."""

    def __init__(self, num_devices, guard_config=GUARD):
        self.guard = guard_config
        mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",), axis_types=(AxisType.Auto,))
        self.split, self.copied = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        self.tx = optim.make(OPTIM, num_steps=20)
        self.faults = {}
        self.seen = []

    def state(self):
        params = {"kernel": jax.random.normal(jax.random.key(1), (16, 8)), "bias": jnp.zeros(8)}
        state = State(jnp.int32(0), params, self.tx.init(params), jax.tree.map(jnp.copy, params), guard.init(self.guard))
        return jax.device_put(state, jax.tree.map(lambda x: self.split if x.shape == (16, 8) else self.copied, state))

    def batches(self, start):
        step = start
        while True:
            self.seen.append(step)
            x_BD = np.random.default_rng(step).normal(size=(8, 16)).astype(np.float32)
            if step in self.faults:
                x_BD[0] = self.faults[step]
            yield jax.device_put(x_BD, self.split)
            step += 1

    @functools.cached_property
    def train_step(self):
        @functools.partial(jax.jit, donate_argnums=0)
        def train_step(state, x_BD):
            noise_BD = jax.random.normal(jax.random.fold_in(jax.random.key(0), state.step), (8, 8))

            def objective(params):
                error = jnp.sum((x_BD @ params["kernel"] + params["bias"][None] - noise_BD) ** 2)
                return error / 64.0, error

            (loss, error), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
            updates, opt_state = self.tx.update(grads, state.opt_state, state.params, step=state.step)
            params = optax.apply_updates(state.params, updates)
            ema = optim.ema_update(state.ema, params, OPTIM.ema_decay)
            values = {"loss": loss, "loss_diff": (error, jnp.float32(64)), "loss_stop": (jnp.float32(0), jnp.float32(0))}
            values |= {"grad_norm": optax.global_norm(grads), "audio_sec": jnp.float32(3)}
            new = State(state.step + 1, params, opt_state, ema, None)
            return guard.judge(self.guard, state, new, values)

        return train_step

    def run(self, workdir, num_steps, *, state=None, origin=None, profile_steps=None, watchdog=None, checkpoint=None, **task):
        """Trains the toy; `task` replaces methods and attributes of its loop.Task."""
        settings = types.SimpleNamespace(
            num_steps=num_steps,
            log=LogConfig(every_steps=3),
            checkpoint=checkpoint or CheckpointConfig(every_steps=4, keep=2),
            guard=self.guard,
            watchdog=watchdog or WatchdogConfig(),
        )
        task = ToyTask(
            {"run": settings, "record": {"n": num_steps}, "train_step": self.train_step, "batches": self.batches} | task
        )
        return loop.run(task, state or self.state(), workdir, origin=origin, profile_steps=profile_steps)


class ToyTask(loop.Task):
    def __init__(self, parts):
        vars(self).update(parts)

    def train_step(self, state, batch): ...

    def batches(self, start): ...


@pytest.fixture(scope="module")
def toy_1():
    return Toy(1)


@pytest.fixture
def toy(toy_1):
    toy_1.faults, toy_1.seen = {}, []
    return toy_1


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def learned(workdir):
    """The rows without what depends on the clock."""
    return [{k: row[k] for k in ("step", "loss", "loss_diff", "loss_stop", "grad_norm", "audio_sec")} for row in rows(workdir)]


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("num_devices", [1, 8])
def test_k_steps_resume_n_minus_k_equal_n_bitwise(tmp_path, num_devices):
    toy = Toy(num_devices)
    whole, last = toy.run(tmp_path / "whole", 10)
    toy.run(tmp_path / "parts", 5)
    toy.seen = []
    parts, _ = toy.run(tmp_path / "parts", 10)
    assert toy.seen[0] == 5
    assert int(parts.step) == int(whole.step) == 10
    assert_equal(parts, whole)
    # Step 5 was the end of the first part; every other row is that of the whole run, to the last bit.
    assert [row for row in learned(tmp_path / "parts") if row["step"] != 5] == learned(tmp_path / "whole")
    assert [row["step"] for row in rows(tmp_path / "whole")] == [3, 6, 9, 10] and last == rows(tmp_path / "whole")[-1]


def test_a_killed_run_leaves_no_trace_in_the_record(tmp_path, toy):
    """What a kill between two saves leaves: rows beyond the checkpoint and half a line."""
    toy.run(tmp_path / "whole", 8)
    toy.run(tmp_path / "killed", 4)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    toy.run(tmp_path / "killed", 8)
    assert [row["step"] for row in rows(tmp_path / "killed")] == [3, 4, 6, 8]
    assert [row for row in learned(tmp_path / "killed") if row["step"] != 4] == learned(tmp_path / "whole")


def test_row(tmp_path, toy):
    toy.run(tmp_path, 4, flops=lambda row: {"all": 1e12 * row["audio_sec"]})
    row = rows(tmp_path)[0]
    assert row["step"] == 3 and row["audio_sec"] == 3
    assert row["audio_sec_per_sec"] == pytest.approx(3 / row["step_sec"])
    assert row["loss_diff"] == pytest.approx(row["loss"], rel=1e-5)
    assert row["loss_stop"] is None and row["mfu"] is None  # nothing counted; no peak known for a CPU
    assert 0 <= row["data_wait_sec"] < row["step_sec"] < 0.5  # the compiling step is left out
    assert json.loads((tmp_path / "config.json").read_text()) == {"n": 4}


def test_finished_run_does_nothing(tmp_path, toy):
    _, first = toy.run(tmp_path, 4)
    toy.seen = []
    state, again = toy.run(tmp_path, 4)
    assert again == first and int(state.step) == 4 and toy.seen == []


def test_broken_step_is_named_and_never_saved(tmp_path):
    """Without a guard. The fault sits in the very step that would be saved; the last row and checkpoint are from before."""
    toy = Toy(1, GuardConfig(on=False))
    toy.faults = {7: np.nan}
    with pytest.raises(loop.BrokenRun, match="step 8: not finite: grad_norm, loss, loss_diff"):
        toy.run(tmp_path, 12)
    assert manager.Checkpoints(tmp_path, 2, 4).latest_step() == 4
    assert [row["step"] for row in rows(tmp_path)] == [3, 6]


def test_signal_saves_and_the_next_start_goes_on(tmp_path, toy):
    toy.run(tmp_path / "whole", 10)

    def batches(start):
        for step, batch in enumerate(toy.batches(start), start):
            if step == 6 and start == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(loop.Preempted, match="SIGTERM at step 7 of 10: saved; start"):
        toy.run(tmp_path / "parts", 10, batches=batches)
    assert signal.getsignal(signal.SIGTERM) is handler
    state, _ = toy.run(tmp_path / "parts", 10, batches=batches)
    assert int(state.step) == 10
    assert learned(tmp_path / "parts") == learned(tmp_path / "whole")


def test_a_signal_before_the_first_update_saves_nothing_and_says_so(tmp_path, toy):
    def batches(start):
        os.kill(os.getpid(), signal.SIGTERM)
        return toy.batches(start)

    with pytest.raises(loop.Preempted, match="SIGTERM at step 0 of 10: no update since the start, nothing to save; start"):
        toy.run(tmp_path, 10, batches=batches)
    assert not steps.has_steps(tmp_path)


_DEEP_IN_C = """
import ctypes
from voxcpm2_jax.train.signals import listening
with listening():
    lock = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
    print("ready", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize("first, second, code", [("SIGTERM", "SIGINT", 130), ("SIGINT", "SIGTERM", 143)])
def test_a_second_signal_ends_the_process_at_once(first, second, code):
    """Even where the loop waits in a call that never comes back, as for a process that is gone."""
    command, pipes = [sys.executable, "-c", _DEEP_IN_C], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as child:
        try:
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.Signals[first])
            child.send_signal(signal.Signals[first])  # to the process, then to its group: one signal
            assert child.stderr.readline().startswith(f"{first}: saving after this step, then stopping")
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(timeout=signals.ECHO_SEC)
            child.send_signal(signal.Signals[second])
            assert child.wait(timeout=10) == code
        finally:
            child.kill()


def test_goodput_counts_steps_that_last_against_all_time_since_the_first_start(tmp_path, toy):
    """A second start goes on counting from the checkpoint: what was beyond it, and the time in between, are lost."""
    toy.run(tmp_path, 1)  # compiled by now, here and for all that follows

    def slow(state, batch):
        time.sleep(0.02)
        return toy.train_step(state, batch)

    (tmp_path / "run").mkdir()
    toy.run(tmp_path / "run", 8, train_step=slow)
    first = rows(tmp_path / "run")[-1]
    counted = steps.read_meta(tmp_path / "run" / "checkpoints" / "8")["clock"]["counted_sec"]
    assert 7 * 0.02 <= counted < 7 * 0.02 + 1 and 0 < first["goodput"] < 1  # the first step of a start compiles
    # Saved at 4, and again after the last row.
    assert [row["checkpoint_sec"] > 0 for row in rows(tmp_path / "run")] == [False, True, False]
    time.sleep(0.5)
    toy.run(tmp_path / "run", 12, train_step=slow)
    clock = steps.read_meta(tmp_path / "run" / "checkpoints" / "12")["clock"]
    assert counted + 3 * 0.02 <= clock["counted_sec"] < counted + 3 * 0.02 + 1
    last = rows(tmp_path / "run")[-1]
    assert last["goodput"] * (time.time() - clock["first_start"]) == pytest.approx(clock["counted_sec"], rel=0.5)


def test_profile_steps_leave_a_trace(tmp_path, toy):
    toy.run(tmp_path, 5, profile_steps=(2, 4))
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))


def test_evaluation_comes_before_the_save_and_joins_the_row(tmp_path, toy):
    calls = []

    def evaluate(state):
        calls.append(int(state.step))
        assert manager.Checkpoints(tmp_path, 2, 4).latest_step() in (None, 4) if calls == [4] else True
        yield "val_loss", np.float32(state.params["bias"].sum())

    toy.run(tmp_path, 9, evaluators=[loop.Evaluator(4, evaluate)])
    assert calls == [4, 8]
    assert [(row["step"], "val_loss" in row) for row in rows(tmp_path)] == [
        (3, False), (4, True), (6, False), (8, True), (9, False)]  # fmt: skip
    # The row out of turn at step 4 takes nothing away from the one of steps 4 to 6.
    toy.run(tmp_path / "plain", 9)
    assert [row for row in learned(tmp_path) if row["step"] in (3, 6, 9)] == learned(tmp_path / "plain")


def test_resume_with_another_layout_lists_the_difference(tmp_path, toy):
    toy.run(tmp_path, 2)
    state = dataclasses.replace(toy.state(), ema=None)
    with pytest.raises(UserError, match="extra ema/bias"):
        toy.run(tmp_path, 4, state=state)


def test_resume_says_what_changed_in_the_config(tmp_path, toy, capsys):
    toy.run(tmp_path, 2, record={"a": {"b": 1}, "c": 2})
    toy.run(tmp_path, 3, record={"a": {"b": 5}, "c": 2})
    assert "config differs from the checkpoint's: a.b: 1 -> 5" in capsys.readouterr().err


def test_save_error_ends_the_run(tmp_path, toy, monkeypatch):
    """An error in the background surfaces at the next step, not at the end."""

    def check(self):
        if self.latest_step() is not None:
            raise OSError("disk full")

    monkeypatch.setattr(manager.Checkpoints, "check", check)
    with pytest.raises(OSError, match="disk full"):
        toy.run(tmp_path, 1000)
    assert max(toy.seen) < 100
