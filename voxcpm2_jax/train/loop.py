"""The one training loop; it knows no model.

    evaluate, save, stop?, batch, dispatch, log the previous step

The host is never more than one step ahead: a step's metrics are fetched when the next one has been dispatched. They are
fetched at once, before anything else happens, when a step is evaluated or saved, so that no broken state reaches the
disk and metrics.jsonl is complete up to every checkpoint. A run resumes by itself from its work directory.

On several processes a signal has to reach all of them between the same two steps; nothing here sees to that yet.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from voxcpm2_jax import metrics
from voxcpm2_jax.checkpoint import Checkpoints, Start, begin
from voxcpm2_jax.config import CheckpointConfig, LogConfig


class BrokenRun(RuntimeError):  # noqa: N818
    """A metric of some step is not finite; its message is the one line to show."""


class Preempted(RuntimeError):  # noqa: N818
    """A signal ended the run after its state was saved: start it again to go on."""


class Evaluator(NamedTuple):
    every_steps: int
    run: Callable[[Any], Iterable[tuple[str, Any]]]  # state -> (name, number, metrics.Audio or metrics.Image)


def run(
    *,
    workdir,
    config: dict,
    state,
    train_step: Callable[[Any, Any], tuple[Any, dict]],
    batches_from: Callable[[int], Iterator],
    num_steps: int,
    log: LogConfig,
    checkpoint: CheckpointConfig,
    evaluators: Sequence[Evaluator] = (),
    flops_of: Callable[[dict], dict[str, float]] | None = None,
    counters_at: Callable[[int], dict] | None = None,
    origin: Start | None = None,
) -> tuple[Any, dict]:
    """Trains until `num_steps` updates are finished, counting those of an earlier start.

    Args:
        config: plain data; goes into WORKDIR/config.json and into every checkpoint.
        state: dataclass of arrays where they belong; consumed. `state.step` counts finished updates. Only its layout is
            used when the run resumes.
        train_step: jitted, donates the state. Its metrics are scalars or (sum, count); with the gradient norm among them
            no state can break unseen.
        batches_from: update number -> iterator of the batches from there on, on the devices.
        flops_of: means of a row -> useful FLOPs of a step by part, over all devices; None: no MFU.
        counters_at: update number -> what the data had given by then; kept in the checkpoint.
        origin: where to start if the workdir holds no checkpoint, and which fields of the config may differ from one's.
            None: afresh, and any.
    Returns:
        state: after the last update.   row: the last row of metrics.jsonl.
    Raises:
        BrokenRun: the step is named; that state is not saved.
        Preempted: SIGTERM or SIGINT came; the state is saved.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir, **dataclasses.asdict(checkpoint))
        stack.callback(checkpoints.close)
        state, meta = begin(checkpoints, state, config, origin or Start())
        start = step = int(state.step)
        if jax.process_index() == 0:
            metrics.replace_file(workdir / "config.json", json.dumps(config, indent=2) + "\n")
        writer = stack.enter_context(metrics.Writer(workdir, start_step=start, num_steps=num_steps))
        stop = stack.enter_context(_signals())
        meter = metrics.Meter(meta.get("meter"))
        clock = _Clock()
        batches = batches_from(start) if start < num_steps else iter(())
        stack.callback(getattr(batches, "close", lambda: None))
        pending = None  # metrics of the newest step, still on the devices

        while True:
            is_new = step > start
            is_last = step >= num_steps or stop.signal is not None
            due = [e for e in evaluators if is_new and step % e.every_steps == 0]
            is_save = is_new and (is_last or checkpoints.is_due(step))
            if due or is_save:
                with clock.busy():
                    _settle(step, pending, meter, clock)
                pending = None
                figures = {name: value for e in due for name, value in e.run(state)}
                meter = _log(step, meter, clock, writer, log, flops_of, figures, is_forced=bool(due) or step == num_steps)
            if is_save:
                counters = counters_at(step) if counters_at else {}
                meta = {"config": config, "data": counters, "meter": meter.state}
                checkpoints.save(step, state, meta, figures)
            if is_last:
                checkpoints.wait()
                break
            checkpoints.check()
            with clock.busy():
                with clock.waiting():
                    batch = next(batches)
                state, new = train_step(state, batch)
                if pending is not None:
                    _settle(step, pending, meter, clock)
            if pending is not None:
                meter = _log(step, meter, clock, writer, log, flops_of, {}, is_forced=False)
            pending = new
            step += 1
            writer.advance(step)

        if step < num_steps:
            name = signal.Signals(stop.signal).name
            raise Preempted(f"{name} at step {step} of {num_steps}: saved; start the same command again to go on")
        return state, writer.last_row or {"step": step}


def _settle(step, pending, meter, clock):
    """Waits for `step`, checks its metrics and counts them."""
    values = metrics.fetch(pending)
    broken = [name for name, (total, count) in values.items() if not math.isfinite(total) or not math.isfinite(count)]
    if broken:
        raise BrokenRun(f"step {step}: not finite: {', '.join(broken)}; the run stops, this state is not saved")
    meter.add(values)
    clock.settled()


def _log(step, meter, clock, writer, log, flops_of, figures, *, is_forced):
    """Writes a row if one is due -> the meter to go on with; a row out of turn leaves the turn's own means alone."""
    is_turn = step % log.every_steps == 0
    if not (is_turn or is_forced):
        return meter
    row = dict(sorted(meter.means().items(), key=lambda item: ("/" in item[0], not item[0].startswith("loss"), item[0])))
    for name in [name for name in row if name.endswith("_sec")]:
        row[f"{name}_per_sec"] = row[name] / clock.step_sec
    row |= {"step_sec": clock.step_sec, "data_wait_sec": clock.wait_sec}
    parts = flops_of(row) if flops_of else {}
    row["mfu"] = metrics.mfu(sum(parts.values()), clock.step_sec) if parts else None
    row |= {f"tflop/{part}": flops / 1e12 for part, flops in parts.items()}
    writer.write(step, row | figures)
    if not is_turn:
        return meter
    clock.reset()
    return metrics.Meter()


class _Clock:
    """Wall time of steps, without evaluations, saves and, where there is another step to tell from, compilation."""

    def __init__(self):
        self._compiled = False
        self.reset()

    def reset(self) -> None:
        self._busy = self._wait = self._first_busy = self._first_wait = 0.0
        self._steps = self._first_steps = 0

    @contextlib.contextmanager
    def busy(self):
        """Around everything a step costs the host, waiting for the devices included."""
        begin = time.perf_counter()
        yield
        self._busy += time.perf_counter() - begin
        if self._steps and not self._compiled:
            self._compiled = True
            self._first_busy, self._first_wait, self._first_steps = self._busy, self._wait, self._steps

    @contextlib.contextmanager
    def waiting(self):
        """Around the wait for a batch."""
        begin = time.perf_counter()
        yield
        self._wait += time.perf_counter() - begin

    def settled(self) -> None:
        self._steps += 1

    @property
    def step_sec(self) -> float:
        return self._mean(self._busy, self._first_busy)

    @property
    def wait_sec(self) -> float:
        return self._mean(self._wait, self._first_wait)

    def _mean(self, total, first):
        if self._steps > self._first_steps:
            return (total - first) / (self._steps - self._first_steps)
        return total / max(self._steps, 1)


class _Stop:
    signal: int | None = None


@contextlib.contextmanager
def _signals():
    """Notes SIGTERM and SIGINT instead of dying of them; a second one acts as usual."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    names = (signal.SIGTERM, signal.SIGINT)
    usual = {name: signal.getsignal(name) for name in names}

    def note(number, _frame):
        stop.signal = number
        for name, handler in usual.items():
            signal.signal(name, handler)

    for name in names:
        signal.signal(name, note)
    try:
        yield stop
    finally:
        for name, handler in usual.items():
            signal.signal(name, handler)
