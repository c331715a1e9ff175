"""The one training loop; it knows no model.

    evaluate, save, stop?, batch, dispatch, log the previous step

The host is never more than one step ahead: a step's metrics are fetched when the next one has been dispatched. They are
fetched at once, before anything else happens, when a step is evaluated or saved, so that no broken state reaches the
disk and metrics.jsonl is complete up to every checkpoint. A run resumes by itself from its work directory, and goes back
to its last checkpoint in the same way, without leaving the process, when its numbers stay bad (train/guard.py).

A signal at any one process reaches all of them between the same two steps: with every step goes a maximum over what the
processes have heard, fetched with the step's metrics, one step late.
"""

import contextlib
import dataclasses
import json
import pathlib
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from voxcpm2_jax import files, metrics
from voxcpm2_jax.checkpoint.manager import Checkpoints
from voxcpm2_jax.config.run import CheckpointConfig, GuardConfig, LogConfig, WatchdogConfig
from voxcpm2_jax.flops import mfu
from voxcpm2_jax.processes import say
from voxcpm2_jax.train.clock import Clock
from voxcpm2_jax.train.guard import VERDICT, BrokenRun, Ledger, complaint, not_finite
from voxcpm2_jax.train.profiler import Profiler
from voxcpm2_jax.train.signals import listening
from voxcpm2_jax.train.start import Start, begin
from voxcpm2_jax.train.watchdog import Watchdog


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
    guard: GuardConfig,
    watchdog: WatchdogConfig,
    evaluators: Sequence[Evaluator] = (),
    flops_of: Callable[[dict], dict[str, float]] | None = None,
    counters_at: Callable[[int, frozenset[int]], dict] | None = None,
    clips_at: Callable[[int], list[str]] | None = None,
    origin: Start | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> tuple[Any, dict]:
    """Trains until `num_steps` updates are finished, counting those of an earlier start.

    Args:
        config: plain data; goes into WORKDIR/config.json and into every checkpoint.
        state: dataclass of arrays where they belong; consumed. `state.step` counts the batches that have gone by, those
            that no update came of among them. Only its layout is used when the run resumes; ShapeDtypeStructs do then.
        train_step: jitted, donates the state. Its metrics are scalars or (sum, count); with guard.VERDICT among them it
            leaves bad updates out by itself, else a figure that is not finite ends the run.
        batches_from: batch number -> iterator of the batches from there on, on the devices.
        flops_of: means of a row -> useful FLOPs of a step by part, over all devices; None: no MFU.
        counters_at: step, batches before it that no update came of -> what the data had given by then; kept in the
            checkpoint.
        clips_at: batch number -> names of what is in it, for messages and records.
        origin: where to start if the workdir holds no checkpoint, and which fields of the config may differ from one's.
            None: afresh, and any.
        profile_steps: (a, b): updates a .. b - 1 are traced, into WORKDIR/profile.
    Returns:
        state: after the last update.   row: the last row of metrics.jsonl.
    Raises:
        BrokenRun: the step is named; that state is not saved.
        Preempted: SIGTERM or SIGINT came to some process; the state is saved, if any update was made.
    """
    workdir = pathlib.Path(workdir)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(listening())
        dog = stack.enter_context(Watchdog(watchdog))
        checkpoints = Checkpoints(workdir, **dataclasses.asdict(checkpoint))
        stack.callback(checkpoints.close)
        bad: list[int] = []  # batches that the run goes back for
        while True:  # once, and once more for every way back
            dog.slow("reading a checkpoint")
            is_own = checkpoints.latest_step() is not None
            if bad and not is_own:
                raise BrokenRun(f"step {bad[-1] + 1}: {len(bad)} bad updates in a row, and no checkpoint yet to go back to")
            state, meta = begin(checkpoints, state, config, origin or Start())
            start = step = int(state.step)
            if is_own and start >= num_steps:
                say(f"all {num_steps} steps are done, nothing is left to do")
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                files.replace_file(workdir / "config.json", json.dumps(config, indent=2) + "\n")
            ledger = Ledger(workdir, guard, meta.get("ledger"))
            if bad:
                say(ledger.step_over(bad, start, clips_at))
            meter = metrics.Meter(meta.get("meter"))
            clock = Clock(meta.get("clock") if is_own else None)
            with (
                metrics.Writer(workdir, start_step=start, num_steps=num_steps) as writer,
                Profiler(profile_steps, workdir / "profile") as profiler,
                contextlib.closing(_Feed(batches_from, start, num_steps)) as feed,
            ):
                settle = partial(_settle, clock=clock, ledger=ledger, stop=stop, clips_at=clips_at)
                write = partial(_log, clock=clock, ledger=ledger, writer=writer, log=log, flops_of=flops_of)
                pending = None  # the newest step, still on the devices
                is_owed = False  # a save is due; it waits for an update that is kept

                while True:
                    is_new = step > start
                    is_last = step >= num_steps or stop.number != 0
                    due = [e for e in evaluators if is_new and step % e.every_steps == 0]
                    is_owed = is_new and (is_owed or is_last or checkpoints.is_due(step))
                    figures = {}
                    if due or is_owed:
                        if pending is not None:
                            with clock.busy():
                                settle(step, pending, meter)
                            pending = None
                        if ledger.is_stuck:
                            break
                        dog.slow(f"evaluating step {step}")
                        figures = {name: value for e in due for name, value in e.run(state)}
                        meter = write(step, meter, figures, is_forced=bool(due) or step == num_steps)
                    if is_owed and (is_last or ledger.is_sound):
                        dog.slow(f"saving step {step}")
                        with clock.saving():
                            counters = counters_at(step, ledger.without_update(step)) if counters_at else {}
                            kept = {"meter": meter.state, "ledger": ledger.state, "clock": clock.state}
                            checkpoints.save(step, state, {"config": config, "data": counters} | kept, figures)
                        is_owed = False
                    if is_last:
                        checkpoints.wait()
                        break
                    checkpoints.check()
                    dog.waiting(step)
                    with clock.waiting():
                        batch, is_strange = feed.next()
                    dog.stepping(step + 1, is_compiling=is_strange)
                    profiler.at(step, pending and pending.figures)
                    with clock.compiling() if is_strange else clock.busy():
                        if ledger.is_over(step):
                            state, new = dataclasses.replace(state, step=_next(state.step)), {}
                        else:
                            state, new = train_step(state, batch)
                        asked = stop.ask()
                    if pending is not None:
                        with clock.busy():
                            settle(step, pending, meter)
                        if ledger.is_stuck:
                            break
                        meter = write(step, meter, {}, is_forced=False)
                    dog.stepped()
                    pending = _Pending(new, asked)
                    step += 1
                    writer.advance(step)

            bad = ledger.bad
            if not bad:
                break
            dog.slow("waiting for a save, to go back to it")
            checkpoints.wait()

        if step < num_steps:
            name = signal.Signals(stop.number).name
            what = "saved" if step > start else "no update since the start, nothing to save"
            raise Preempted(f"{name} at step {step} of {num_steps}: {what}; start the same command again to go on")
        return state, writer.last_row or {"step": step}


class _Pending(NamedTuple):
    """A step that is on its way."""

    figures: dict  # of the update; {} of a batch that is passed over
    asked: Any  # what `_Stop.ask` gave


_next = jax.jit(lambda step: step + 1)


class _Feed:
    """The batches from `start` on."""

    def __init__(self, batches_from, start: int, num_steps: int):
        self._batches = batches_from(start) if start < num_steps else iter(())
        self._shapes: set[tuple] = set()

    def next(self) -> tuple[Any, bool]:
        """The next batch, and whether it is the first of its shape: the step will have to be compiled for it."""
        batch = next(self._batches)
        shape = tuple(x.shape for x in jax.tree.leaves(batch))
        is_strange = shape not in self._shapes
        self._shapes.add(shape)
        return batch, is_strange

    def close(self) -> None:
        getattr(self._batches, "close", lambda: None)()


def _settle(step, pending, meter, *, clock, ledger, stop, clips_at) -> None:
    """Waits for update `step`, checks its figures and counts them."""
    values = metrics.fetch(pending.figures)
    stop.settle(pending.asked)
    verdict = {name: values.pop(name)[0] for name in VERDICT if name in values}
    is_skipped = bool(verdict.get("skipped"))
    clock.settled(is_kept=bool(values) and not is_skipped)
    if is_skipped:
        ledger.skip(step - 1, int(verdict["skipped_in_a_row"]))
        meter.add(dict.fromkeys(values, (0.0, 0.0)))
        clips = f"; clips {_listing(clips_at(step - 1))}" if clips_at and jax.process_index() == 0 else ""
        say(f"step {step}: update skipped, {ledger.in_a_row} in a row: {complaint(values, verdict)}; batch {step - 1}{clips}")
    elif values:
        if broken := not_finite(values):
            raise BrokenRun(f"step {step}: not finite: {', '.join(broken)}; the run stops, this state is not saved")
        ledger.keep()
        meter.add(values)
    else:
        ledger.pass_over()


def _listing(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _log(step, meter, figures, *, is_forced, clock, ledger, writer, log, flops_of):
    """Writes a row if one is due -> the meter to go on with; a row out of turn leaves the turn's own means alone."""
    is_turn = step % log.every_steps == 0
    if not (is_turn or is_forced):
        return meter
    means = meter.means() or {name: None for name in writer.last_row or {} if name.startswith("loss")}
    row = dict(sorted(means.items(), key=lambda item: ("/" in item[0], not item[0].startswith("loss"), item[0])))
    is_counted = row.get("loss") is not None  # some update of these steps was kept
    for name in [name for name in row if name.endswith("_sec")]:
        row[f"{name}_per_sec"] = row[name] / clock.step_sec if is_counted else None
    row |= clock.row | {"skipped": len(ledger.without_update(step))}
    parts = flops_of(row) if flops_of and is_counted else {}
    row["mfu"] = mfu(sum(parts.values()), clock.step_sec) if parts else None
    row |= {f"tflop/{part}": flops / 1e12 for part, flops in parts.items()}
    writer.write(step, row | figures)
    if not is_turn:
        return meter
    clock.reset()
    return metrics.Meter()
