"""TODO bench.chaos."""

import dataclasses
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np

from voxcpm2_jax.bench.faults import (
    DAMAGES,
    altered_shard,
    bad_numbers,
    changing_processes,
    damaged_checkpoint,
    full_disk,
    killed_peer,
    kills_in_turn,
    second_signal,
    stopped_by,
)
from voxcpm2_jax.bench.lab import PATIENCE_SEC, SAVE_EVERY, STEPS, Fell, Lab, Outcome
from voxcpm2_jax.config.run import (
    BackboneRun,
    BatchConfig,
    CheckpointConfig,
    GuardConfig,
    LogConfig,
    SampleConfig,
    StageConfig,
    ValidationConfig,
    WatchdogConfig,
)
from voxcpm2_jax.processes import say

_MOST_AT_ONCE = 4  # faults under way at the same time, a core for each


class Fault(NamedTuple):
    """A line of the table."""

    fault: str
    injected: int
    survived: int
    lost_steps: int = 0
    lost_data: int = 0
    note: str = ""  # what went otherwise than it should, or how long it took


def chaos(run: BackboneRun, workdir=None, *, kills: int = 20, seed: int = 0, quick: bool = False) -> dict:
    """Runs everything -> {"ok", "faults": the table, ..}; a line on standard error for each fault as it is done.

    Args:
        run: gives the model.   workdir: absent or empty; None: a temporary one, removed if all went well.
        kills: SIGKILLs at random moments.   seed: of these moments, and of which bit is flipped.
        quick: three kills, and one of each kind of the rest.
    """
    directory = pathlib.Path(workdir or tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    lab = Lab(_lively(run), directory.absolute())
    begin = time.monotonic()
    say(f"a run left in peace, {STEPS} updates, in {lab.directory}")
    lab.finish(lab.peace)
    trials: list[tuple[str, int, Callable]] = [
        *(
            (f"SIGKILL during {', '.join(kinds)}", n, partial(kills_in_turn, kinds=kinds, kills=n))
            for kinds, n in _shares(kills, quick)
        ),
        *((name, 1, partial(stopped_by, name=name)) for name in (("SIGTERM",) if quick else ("SIGTERM", "SIGINT"))),
        ("SIGTERM twice", 1, second_signal),
        *(
            (f"{' -> '.join(map(str, n))} processes", len(n) - 1, partial(changing_processes, numbers=n))
            for n in ((1, 2, 1) if quick else (1, 2, 4, 1),)
        ),
        *(
            (f"newest checkpoint {how}", 1, partial(damaged_checkpoint, how=how))
            for how in (DAMAGES[2:3] if quick else DAMAGES)
        ),
        ("bit flipped in a data shard", 1, altered_shard),
        ("disk full during a save", 1, full_disk),
        ("latents that are not finite, in 3 batches", 3, bad_numbers),
        # After the others: by then the program of two processes is compiled.
        *(
            (f"SIGKILL of the {('first', 'second')[n]} of two processes", 1, partial(killed_peer, victim=n))
            for n in ((0,) if quick else (0, 1))
        ),
    ]

    def attempt(number: int) -> Fault:
        name, injected, trial = trials[number]
        try:
            outcome = trial(lab.branch(np.random.default_rng((seed, number))))
        except Fell as fell:
            outcome = Outcome([str(fell)])
        text = "; ".join(" ".join(problem.split()) for problem in outcome.problems)[:500] or outcome.note
        survived = 0 if outcome.problems else injected
        fault = Fault(name, injected, survived, outcome.lost_steps, outcome.lost_data, text)
        say(_line(fault))
        return fault

    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_AT_ONCE)) as pool:
        try:
            faults = list(pool.map(attempt, range(len(trials))))
        except BaseException:
            lab.stop()
            raise
    ok = all(fault.survived == fault.injected and not fault.lost_data for fault in faults)
    if ok and workdir is None:
        shutil.rmtree(directory)
    return {
        "ok": ok,
        "injected": sum(fault.injected for fault in faults),
        "survived": sum(fault.survived for fault in faults),
        "lost_steps": sum(fault.lost_steps for fault in faults),
        "lost_data": sum(fault.lost_data for fault in faults),
        "sec": round(time.monotonic() - begin, 1),
        "faults": [fault._asdict() for fault in faults],
    }


def show(result: dict) -> None:
    """The table, on standard error."""
    header = Fault("fault", "injected", "survived", "lost steps", "lost data", "")
    for line in (header, *(Fault(**fault) for fault in result["faults"])):
        say(_line(line))
    say(f"{result['survived']} of {result['injected']} survived in {result['sec']:.0f} s")


def _line(fault: Fault) -> str:
    return f"{fault.fault:44} {fault.injected:>8} {fault.survived:>8} {fault.lost_steps:>10} {fault.lost_data:>9}  {fault.note}"


def _lively(run: BackboneRun) -> BackboneRun:
    """The same model in a run that has everything in it."""
    slots = min(64, run.batch.slots)
    return dataclasses.replace(
        run,
        num_steps=STEPS,
        batch=BatchConfig(rows=8, slots=slots, patches=5 * slots // 8),
        accumulate=2,
        mesh=(1, -1, 1),
        optim=dataclasses.replace(
            run.optim, warmup_steps=5, schedule="wsd", schedule_steps=STEPS, decay_fraction=0.5, ema_decay=0.9
        ),
        stages=(StageConfig(), StageConfig(first_step=22, min_sec=1.0)),
        checkpoint=CheckpointConfig(every_steps=SAVE_EVERY, keep=3),
        log=LogConfig(every_steps=1),
        guard=GuardConfig(window=16, max_in_a_row=2),
        watchdog=WatchdogConfig(slow_sec=PATIENCE_SEC, action="exit"),
        samples=SampleConfig(),
        validation=ValidationConfig(every_steps=0),
    )


def _shares(kills: int, quick: bool) -> list[tuple[tuple[str, ...], int]]:
    """How many kills, by the moments that they come at in turn."""
    if quick:
        return [(("start-up", "a step", "a save"), 3)]
    start, save = -(-kills // 4), -(-kills // 4)
    return [(("start-up",), start), (("a step",), kills - start - save), (("a save",), save)]
