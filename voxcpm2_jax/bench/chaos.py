"""`voxcpm2-jax chaos`: injects faults into training runs of a small model and compares their results with a control run.

All runs are real processes of `voxcpm2-jax train` on this machine's CPU. Faults come from outside alone (signals, limits,
files): the training code does not know about them. faults.py lists them; harness.py starts the processes and compares.

The run has 40 updates with a checkpoint every 5, and uses gradient accumulation, averaged weights, a schedule with warm-up,
stable part and decay (WSD), a second stage and the end of an epoch. A fault is *survived* if the run, started again after it,
ends with the results of the control run: every array of the last checkpoint bit for bit, and every row of metrics.jsonl
except timings; across different numbers of processes, losses within a relative 1e-6.

    lost steps   updates that had to be computed again; a fault costs at most those since the last undamaged checkpoint
    lost data    undamaged checkpoints that the run did not resume from; 0 is expected
"""

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
    changing_process_count,
    damaged_checkpoint,
    full_disk,
    killed_peer,
    non_finite_latents,
    repeated_kills,
    second_signal,
    slow_peer,
    stop_signal,
)
from voxcpm2_jax.bench.harness import SAVE_EVERY, STEPS, TIMEOUT_SEC, Harness, Outcome, RunFailed
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

_MAX_PARALLEL = 4  # faults injected at the same time, one per core


class Fault(NamedTuple):
    """A row of the table."""

    fault: str
    injected: int
    survived: int
    lost_steps: int = 0
    lost_data: int = 0
    note: str = ""  # what went wrong; otherwise a detail, such as how long it took


def chaos(run: BackboneRun, workdir=None, *, kills: int = 20, seed: int = 0, quick: bool = False) -> dict:
    """Injects all faults and prints a line on standard error after each.

    Args:
        run: its model is used.   workdir: absent or empty; None: a temporary one, removed if everything is survived.
        kills: number of SIGKILLs at random moments.   seed: of these moments and of the bits to flip.
        quick: three kills, and one fault of every other kind.
    Returns:
        "ok", totals, and "faults": the rows of the table.
    """
    directory = pathlib.Path(workdir or tempfile.mkdtemp(prefix="chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    harness = Harness(_short_run(run), directory.absolute())
    begin = time.monotonic()
    say(f"control run of {STEPS} updates in {harness.directory}")
    harness.run_to_end(harness.control)
    trials: list[tuple[str, int, Callable]] = [
        *(
            (f"SIGKILL during {', '.join(moments)}", n, partial(repeated_kills, moments=moments, kills=n))
            for moments, n in _kills_by_moment(kills, quick)
        ),
        *((name, 1, partial(stop_signal, name=name)) for name in (("SIGTERM",) if quick else ("SIGTERM", "SIGINT"))),
        ("SIGTERM twice", 1, second_signal),
        *(
            (f"{' -> '.join(map(str, n))} processes", len(n) - 1, partial(changing_process_count, numbers=n))
            for n in ((1, 2, 1) if quick else (1, 2, 4, 1),)
        ),
        *(
            (f"newest checkpoint: {how}", 1, partial(damaged_checkpoint, how=how))
            for how in (DAMAGES[2:3] if quick else DAMAGES)
        ),
        ("bit flipped in a data shard", 1, altered_shard),
        ("disk full during a save", 1, full_disk),
        ("non-finite latents in 3 batches", 3, non_finite_latents),
        # Last: by then the program for two processes is compiled.
        *(
            (f"SIGKILL of the {('first', 'second')[n]} of two processes", 1, partial(killed_peer, victim=n))
            for n in ((0,) if quick else (0, 1))
        ),
        *(() if quick else (("SIGSTOPs of the second of two processes", 1, partial(slow_peer, victim=1)),)),
    ]

    def run_trial(number: int) -> Fault:
        name, injected, trial = trials[number]
        try:
            outcome = trial(harness.with_rng(np.random.default_rng((seed, number))))
        except RunFailed as failure:
            outcome = Outcome([str(failure)])
        text = "; ".join(" ".join(problem.split()) for problem in outcome.problems)[:500] or outcome.note
        survived = 0 if outcome.problems else injected
        fault = Fault(name, injected, survived, outcome.lost_steps, outcome.lost_data, text)
        say(_line(fault))
        return fault

    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_PARALLEL)) as pool:
        try:
            faults = list(pool.map(run_trial, range(len(trials))))
        except BaseException:
            harness.stop()
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
    """Prints the table on standard error."""
    header = Fault("fault", "injected", "survived", "lost steps", "lost data", "")
    for line in (header, *(Fault(**fault) for fault in result["faults"])):
        say(_line(line))
    say(f"{result['survived']} of {result['injected']} survived in {result['sec']:.0f} s")


def _line(fault: Fault) -> str:
    return f"{fault.fault:44} {fault.injected:>8} {fault.survived:>8} {fault.lost_steps:>10} {fault.lost_data:>9}  {fault.note}"


def _short_run(run: BackboneRun) -> BackboneRun:
    """A short run of the same model that uses every mechanism of training."""
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
        watchdog=WatchdogConfig(slow_sec=TIMEOUT_SEC, action="exit"),
        samples=SampleConfig(),
        validation=ValidationConfig(every_steps=0),
    )


def _kills_by_moment(kills: int, quick: bool) -> list[tuple[tuple[str, ...], int]]:
    """(moments, number of kills) of each trial; the kills of a trial come at its moments in turn."""
    if quick:
        return [(("start-up", "a step", "a save"), 3)]
    start, save = -(-kills // 4), -(-kills // 4)
    return [(("start-up",), start), (("a step",), kills - start - save), (("a save",), save)]
