"""The one training loop. It knows no model: the backbone and the codec are Tasks.

    evaluate, save, stop?, batch, dispatch, log the previous step

The host runs at most one step ahead of the devices: a step's metrics are fetched after the next step has been dispatched.
Before an evaluation or a save they are fetched at once, so that no broken state reaches the disk and metrics.jsonl is
complete up to every checkpoint.

A run resumes by itself from its workdir. When too many updates in a row are bad (train/guard.py), the run rolls back to its
last checkpoint in the same way, without leaving the process: that is a new attempt.

A signal to any process stops all processes between the same two steps (signals.py). What each process does by itself is
compared, to find a slow one (peers.py).
"""

import abc
import contextlib
import dataclasses
import json
import pathlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from voxcpm2_jax import files, flops, metrics
from voxcpm2_jax.checkpoint.manager import Checkpoints
from voxcpm2_jax.config.run import BackboneRun, VAERun
from voxcpm2_jax.processes import say
from voxcpm2_jax.train.clock import Clock
from voxcpm2_jax.train.guard import VERDICT, BrokenRun, Ledger, complaint, not_finite
from voxcpm2_jax.train.peers import Peers
from voxcpm2_jax.train.profiler import Profiler
from voxcpm2_jax.train.signals import Stop, listening
from voxcpm2_jax.train.start import Start, begin
from voxcpm2_jax.train.watchdog import Watchdog


class Preempted(RuntimeError):  # noqa: N818
    """A signal ended the run after its state was saved; started again, the run continues."""


class Evaluator(NamedTuple):
    every_steps: int
    run: Callable[[Any], Iterable[tuple[str, Any]]]  # state -> (name, number, metrics.Audio or metrics.Image)


class Task(abc.ABC):
    """What a run trains.

    Attributes:
        run: the run's config; the loop reads `num_steps`, `log`, `checkpoint`, `guard` and `watchdog` of it.
        record: plain data that is saved as WORKDIR/config.json and in every checkpoint.
        evaluators: what is evaluated, and how often.
    """

    run: BackboneRun | VAERun
    record: dict
    evaluators: Sequence[Evaluator] = ()

    @abc.abstractmethod
    def train_step(self, state, batch) -> tuple[Any, dict]:
        """One jitted update, which donates the state -> (state, metrics).

        Metrics are scalars, pairs (sum, count) or Tables. With guard.VERDICT among them the step skips bad updates by
        itself; without it a metric that is not finite ends the run.
        """

    @abc.abstractmethod
    def batches(self, start: int) -> Iterator:
        """The batches from number `start` on, on the devices."""

    def flops(self, row: dict) -> dict[str, float]:
        """Useful FLOPs of a step by part, over all devices, from the means of a row; empty: no MFU is logged."""
        return {}

    def counters(self, step: int, without: frozenset[int]) -> dict:
        """What the model was trained on before a step, for the checkpoint; `without`: batches that had no update."""
        return {}

    def clips(self, batch: int) -> list[str]:
        """Names of the clips in a batch, for messages and records."""
        return []


def run(task: Task, state, workdir, *, origin: Start | None = None, profile_steps: tuple[int, int] | None = None):
    """Trains until `task.run.num_steps` updates are finished, counting those of earlier starts.

    Args:
        state: dataclass of arrays on their devices; consumed. `state.step` counts the batches that have been consumed, with
            or without an update. A resuming run uses only its layout; ShapeDtypeStructs are enough then.
        origin: where to start if the workdir holds no checkpoint, and which fields of the config may differ from a
            checkpoint's. None: from `state`, and any field may differ.
        profile_steps: (a, b): updates a .. b - 1 are traced into WORKDIR/profile.
    Returns:
        state: after the last update.   row: the last row of metrics.jsonl.
    Raises:
        BrokenRun: names the step; that state is not saved.
        Preempted: SIGTERM or SIGINT came to some process; the state is saved if any update was made.
    """
    home, workdir = workdir, pathlib.Path(workdir)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(listening())
        dog = stack.enter_context(Watchdog(task.run.watchdog))
        peers = stack.enter_context(Peers(task.run.log.slow_share))
        checkpoints = Checkpoints(home, **dataclasses.asdict(task.run.checkpoint))
        stack.callback(checkpoints.close)
        bad: list[int] = []  # batches whose updates were bad and made the run roll back
        while True:
            dog.slow("reading a checkpoint")
            is_resumed = checkpoints.latest_step() is not None
            if bad and not is_resumed:
                raise BrokenRun(f"step {bad[-1] + 1}: {len(bad)} bad updates in a row, and no checkpoint yet to roll back to")
            state, meta = begin(checkpoints, state, task.record, origin or Start())
            attempt = _Attempt(task, workdir, checkpoints, stop, dog, peers, state, meta, is_resumed)
            attempt.train(bad, profile_steps)
            state, bad = attempt.state, attempt.ledger.bad
            if not bad:
                break
            dog.slow("waiting for a save, to roll back to it")
            checkpoints.wait()
        step, num_steps = attempt.step, task.run.num_steps
        if step < num_steps:
            name = signal.Signals(stop.number).name
            what = "saved" if step > attempt.start else "no update since the start, nothing to save"
            raise Preempted(f"{name} at step {step} of {num_steps}: {what}; start the same command again to continue")
        return state, attempt.last_row or {"step": step}


class _Pending(NamedTuple):
    """A step that has been dispatched and not yet fetched."""

    figures: dict  # of the update; empty for a batch that is stepped over
    asked: Any  # from `Stop.ask`
    compared: Any  # from `Peers.ask`; None for a step that is not logged


class _Attempt:
    """The steps from one checkpoint, or from a fresh state, until the run ends, is stopped, or has to roll back.

    Attributes:
        state: the newest state.   start, step: steps finished when the attempt began, and now.
        ledger: which batches had no update.   last_row: the last row of metrics.jsonl.
    """

    def __init__(
        self, task: Task, workdir: pathlib.Path, checkpoints: Checkpoints, stop: Stop, dog: Watchdog, peers: Peers, state,
        meta, is_resumed,
    ):  # fmt: skip
        self._task, self._workdir, self._checkpoints = task, workdir, checkpoints
        self._stop, self._dog, self._peers = stop, dog, peers
        self.state = state
        self.start = self.step = int(state.step)
        self.last_row: dict | None = None
        if is_resumed and self.step >= task.run.num_steps:
            say(f"all {task.run.num_steps} steps are done, nothing is left to do")
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            files.replace_file(workdir / "config.json", json.dumps(task.record, indent=2) + "\n")
        self.ledger = Ledger(workdir, task.run.guard, meta.get("ledger"))
        self._meter = metrics.Meter(meta.get("meter"))
        self._clock = Clock(meta.get("clock") if is_resumed else None)
        self._pending: _Pending | None = None  # the newest step
        self._is_save_due = False  # waits for an update that is kept

    def train(self, bad: Sequence[int], profile_steps: tuple[int, int] | None) -> None:
        """Runs all steps.

        Args:
            bad: batches that made the attempt before this one roll back; they are stepped over.
        """
        run = self._task.run
        if bad:
            say(self.ledger.step_over(bad, self.start, self._task.clips))
        with (
            metrics.Writer(
                self._workdir,
                start_step=self.start,
                num_steps=run.num_steps,
                services=run.log.trackers,
                project=run.log.project,
                record=self._task.record,
            ) as self._writer,
            Profiler(profile_steps, self._workdir / "profile") as self._profiler,
            contextlib.closing(_Feed(self._task.batches, self.start, run.num_steps)) as self._feed,
        ):
            while not self.ledger.is_stuck:
                is_last = self.step >= run.num_steps or self._stop.number != 0
                self._evaluate_and_save(is_last)
                if self.ledger.is_stuck:
                    break
                if is_last:
                    self._checkpoints.wait()
                    break
                self._checkpoints.check()
                self._update()
            self.last_row = self._writer.last_row

    def _evaluate_and_save(self, is_last: bool) -> None:
        """Runs the evaluators that are due at this step, logs their figures, and saves if a save is due."""
        step, checkpoints, ledger = self.step, self._checkpoints, self.ledger
        is_new = step > self.start
        due = [e for e in self._task.evaluators if is_new and step % e.every_steps == 0]
        self._is_save_due = is_new and (self._is_save_due or is_last or checkpoints.is_due(step))
        if not due and not self._is_save_due:
            return
        self._settle()
        if ledger.is_stuck:
            return
        self._peers.turn(None)
        self._dog.slow(f"evaluating step {step}")
        figures = {name: value for e in due for name, value in e.run(self.state)}
        self._log(figures, is_forced=bool(due) or step == self._task.run.num_steps)
        if self._is_save_due and (is_last or ledger.is_sound):
            self._peers.time_devices()
            self._dog.slow(f"saving step {step}")
            with self._clock.saving():
                counters = self._task.counters(step, ledger.without_update(step))
                kept = {"meter": self._meter.state, "ledger": ledger.state, "clock": self._clock.state}
                checkpoints.save(step, self.state, {"config": self._task.record, "data": counters} | kept, figures)
            self._is_save_due = False

    def _update(self) -> None:
        """Dispatches the next step, then settles and logs the one before."""
        step = self.step
        self._dog.waiting(step)
        self._peers.turn("data")
        with self._clock.waiting():
            batch, is_new_shape = self._feed.next()
        self._peers.turn("host")
        self._dog.stepping(step + 1, is_compiling=is_new_shape)
        self._profiler.at(step, self._pending and self._pending.figures)
        with self._clock.compiling() if is_new_shape else self._clock.busy():
            if self.ledger.is_over(step):
                self.state, figures = dataclasses.replace(self.state, step=_next(self.state.step)), {}
            else:
                self.state, figures = self._task.train_step(self.state, batch)
            asked = self._stop.ask()
            compared = self._peers.ask() if self._is_regular(step + 1) else None
        if self._pending is None or is_new_shape:
            self._peers.drop()
        if self._pending is not None:
            self._settle()
            if self.ledger.is_stuck:
                return
            self._log({}, is_forced=False)
        self._dog.stepped()
        self._pending = _Pending(figures, asked, compared)
        self.step += 1
        self._writer.advance(self.step)

    def _settle(self) -> None:
        """Waits for the pending step, if there is one, checks its figures and counts them."""
        if self._pending is None:
            return
        (figures, asked, compared), self._pending = self._pending, None
        step, ledger, meter = self.step, self.ledger, self._meter
        self._peers.settling(figures)
        with self._clock.busy():
            values = metrics.fetch(figures)
            self._stop.settle(asked)
            self._peers.settle(compared)
        self._peers.turn("host")
        verdict = {name: values.pop(name)[0] for name in VERDICT if name in values}
        is_skipped = bool(verdict.get("skipped"))
        self._clock.settled(is_kept=bool(values) and not is_skipped)
        if is_skipped:
            ledger.skip(step - 1, int(verdict["skipped_in_a_row"]))
            meter.add(dict.fromkeys(values, (0.0, 0.0)))
            names = self._task.clips(step - 1) if jax.process_index() == 0 else []
            what = f"{ledger.in_a_row} in a row: {complaint(values, verdict)}; batch {step - 1}"
            say(f"step {step}: update skipped, {what}" + (f"; clips {_listing(names)}" if names else ""))
        elif values:
            if broken := not_finite(values):
                raise BrokenRun(f"step {step}: not finite: {', '.join(broken)}; the run stops, this state is not saved")
            ledger.keep()
            meter.add(values)
        else:
            ledger.pass_over()

    def _log(self, figures: dict, *, is_forced: bool) -> None:
        """Writes a row if one is due. A forced row between two regular ones leaves the means of the regular rows alone."""
        step, clock, writer = self.step, self._clock, self._writer
        is_regular = self._is_regular(step)
        if not (is_regular or is_forced):
            return
        means = self._meter.means() or {name: None for name in writer.last_row or {} if name.startswith("loss")}
        row = dict(sorted(means.items(), key=lambda item: ("/" in item[0], not item[0].startswith("loss"), item[0])))
        has_update = row.get("loss") is not None  # at least one update of these steps was kept
        for name in [name for name in row if name.endswith("_sec")]:
            row[f"{name}_per_sec"] = row[name] / clock.step_sec if has_update else None
        row |= clock.row | self._peers.row(clock.step_sec) | {"skipped": len(self.ledger.without_update(step))}
        parts = self._task.flops(row) if has_update else {}
        row["mfu"] = flops.mfu(sum(parts.values()), clock.step_sec) if parts else None
        row |= {f"tflop/{part}": of_part / 1e12 for part, of_part in parts.items()}
        writer.write(step, row | figures)
        if is_regular:
            clock.reset()
            self._meter = metrics.Meter()

    def _is_regular(self, step: int) -> bool:
        """Whether a row is due after this step, whatever else happens."""
        return step % self._task.run.log.every_steps == 0


_next = jax.jit(lambda step: step + 1)


class _Feed:
    """The batches from `start` on."""

    def __init__(self, batches: Callable[[int], Iterator], start: int, num_steps: int):
        self._batches = batches(start) if start < num_steps else iter(())
        self._shapes: set[tuple] = set()

    def next(self) -> tuple[Any, bool]:
        """The next batch, and whether its shape is new: the step is then compiled for it."""
        batch = next(self._batches)
        shape = tuple(x.shape for x in jax.tree.leaves(batch))
        is_new_shape = shape not in self._shapes
        self._shapes.add(shape)
        return batch, is_new_shape

    def close(self) -> None:
        getattr(self._batches, "close", lambda: None)()


def _listing(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
