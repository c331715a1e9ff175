"""`voxcpm2-jax bench rehearsal`: a run of the released curriculum on a corpus of 10^7 clips, rehearsed on one machine.

It meets what a pod meets and a laptop does not: an index of 10^7 clips, more shards than a process may open, every shape of
the curriculum, several processes that are killed, stopped, resumed in another number, and a branch.

    corpus     10^7 clips in 3,000 shards. The shards are links to a few distinct ones, so that a disk holds them; index,
               pairs and identities are those of as many different clips.
    plan       the run's own curriculum, rows and steps: time and memory until every stage has its first batch, hours by stage
    training   the same curriculum with 1/16 of the slots of a row, patches of 16 times the duration, the model `tiny`, and 40
               updates instead of all; the processes may open no more than 1,024 files each

Nothing is compared with a control run: `chaos` does that.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from voxcpm2_jax.bench.corpora import add_models, write_corpus
from voxcpm2_jax.bench.harness import Child, Harness, RunFailed, last_step, metric_rows, saved_steps
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.run import (
    BackboneRun,
    CheckpointConfig,
    LogConfig,
    SampleConfig,
    ValidationConfig,
    WatchdogConfig,
)
from voxcpm2_jax.data.clips import LENGTHS, Clip, Index
from voxcpm2_jax.data.forecast import forecast
from voxcpm2_jax.data.identity import IDENTITY
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.shards import Shards
from voxcpm2_jax.processes import say

STEPS = 40  # updates of the training
SHORTER = 16  # rows have so many times fewer slots, and patches last so many times longer
OPEN_FILES = 1024
_DISTINCT_SHARDS = 10
_SAVE_EVERY, _KEEP_EVERY, _BRANCH = 2, 4, 16  # updates
_LANGUAGES = 15


def rehearsal(
    run: BackboneRun, workdir=None, *, clips: int = 10_000_000, shards: int = 3000, processes: int = 4, workers: int = 2
) -> dict:
    """Makes the corpus, plans, trains; prints a line on standard error after each part.

    Args:
        run: its curriculum, batch, schedule and number of updates are used.   workdir: absent or empty; None: a temporary one,
            removed if all went well.   clips, shards: of the corpus.   processes: of the training.   workers: processes that
            the training is resumed with at its end.
    Returns:
        plain data: "ok", "problems", "sec", and the figures of "corpus", "plan", "stages" and "training".
    """
    directory = pathlib.Path(workdir or tempfile.mkdtemp(prefix="rehearsal-")).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    small = shrunk(run, processes)
    say(f"making a corpus of {clips:,} clips in {shards:,} shards in {directory}")
    corpus = _write(directory / "shards", small, clips, shards)
    say(_figures("corpus", corpus))
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own, for its memory
        large = dataclasses.replace(small, stages=run.stages, num_steps=run.num_steps, batch=_shorter(run, run.batch.rows))
        plan = pool.apply(_plan, (directory / "shards", large))
    stages = plan.pop("stages")
    for line in stages:
        say(line)
    say(_figures("plan", plan))
    training, problems = _train(Harness(small, directory), directory / "shards", processes, workers)
    for part in training:
        say(_figures(part["part"], part))
    if not problems and workdir is None:
        shutil.rmtree(directory)
    sec = round(time.monotonic() - begin, 1)
    figures = {"corpus": corpus, "plan": plan, "stages": stages, "training": training}
    return {"ok": not problems, "problems": problems, "sec": sec} | figures


def shrunk(run: BackboneRun, rows: int) -> BackboneRun:
    """The training of the rehearsal: the run's curriculum in STEPS updates, with short rows and the smallest model."""
    factor = run.num_steps / STEPS
    optim = run.optim

    def fewer(steps: int | None) -> int | None:
        return None if steps is None else max(1, round(steps / factor))

    steps = {"schedule_steps": fewer(optim.schedule_steps), "decay_steps": fewer(optim.decay_steps)}
    model = dataclasses.replace(MODELS["tiny"], max_length=max(batch.slots for batch in run.batches) // SHORTER)
    return dataclasses.replace(
        run,
        model=model,
        num_steps=STEPS,
        batch=_shorter(run, rows),
        accumulate=1,
        mesh=(1, -1, 1),
        patch_sec=run.patch_sec * SHORTER,
        stages=tuple(dataclasses.replace(stage, first_step=round(stage.first_step / factor)) for stage in run.stages),
        optim=dataclasses.replace(optim, warmup_steps=fewer(optim.warmup_steps), **steps),
        checkpoint=CheckpointConfig(every_steps=_SAVE_EVERY, keep=3, keep_every_steps=_KEEP_EVERY),
        log=LogConfig(every_steps=1),
        watchdog=WatchdogConfig(slow_sec=600.0, action="exit"),
        samples=SampleConfig(),
        validation=ValidationConfig(every_steps=STEPS // 4, max_clips=32),
    )


def _shorter(run: BackboneRun, rows: int):
    batch = run.batch
    return dataclasses.replace(batch, rows=rows, slots=batch.slots // SHORTER, patches=batch.patches // SHORTER)


# ---- corpus ----------------------------------------------------------------------------------------------------------


def _write(directory: pathlib.Path, run: BackboneRun, clips: int, shards: int) -> dict:
    """The corpus and its held-out clips -> figures."""
    begin = time.perf_counter()
    distinct = min(_DISTINCT_SHARDS, shards)
    copies = shards // distinct
    for place, number, files, seed in ((directory, clips, copies, 0), (directory / "heldout", 200, 1, 1)):
        index, parts = _clips(run, number // files, distinct if files > 1 else 1, seed)
        table = np.zeros(files * len(index.lengths), IDENTITY)
        table["file"] = np.random.default_rng(seed).permutation(len(table)) * np.uint64(2) + np.uint64(seed)
        table["end_sec"], table["speaker"] = np.inf, table["file"] % np.uint64(200_000)
        starts = np.repeat(np.arange(files) * len(index.lengths), len(index.lengths))[:, None]
        pairs = np.tile(index.pairs, (files, 1))
        whole = Index(np.tile(index.lengths, files), index.groups, np.where(pairs < 0, pairs, pairs + starts).astype(np.int32))
        header = write_corpus(
            place, run.model, run.patch_sec, whole, parts, copies=files, identities=table, source=f"rehearsal {seed}"
        )
        add_models(place, header)
    index_bytes = sum(path.stat().st_size for path in directory.glob("*.npy"))
    return {
        "clips": len(np.load(directory / "lengths.npy", mmap_mode="r")),
        "shards": len(list(directory.glob("*.array_record"))),
        "index_mb": round(index_bytes / 1e6),
        "wall_sec": round(time.perf_counter() - begin, 1),
    }


def _clips(run: BackboneRun, number: int, shards: int, seed: int) -> tuple[Index, list[Iterator[Clip]]]:
    """Clips with the lengths of speech, 3 in 100 longer than 30 s; a third each with reference clips and descriptions."""
    rng = np.random.default_rng((seed, 7))
    sec = (7 * np.exp(0.6 * rng.standard_normal(number))).clip(1, 30)
    is_long = rng.random(number) < 0.03
    sec[is_long] = rng.uniform(30, 300, is_long.sum())
    lengths = np.zeros(number, LENGTHS)
    lengths["patches"] = np.ceil(sec / run.patch_sec)
    lengths["text"] = np.maximum(1, 3.2 / SHORTER * sec)
    lengths["described"] = np.where(rng.random(number) < 1 / 3, lengths["text"] + 4, 0)
    lengths["group"] = (np.arange(number) * _LANGUAGES // number) ** 2 // _LANGUAGES  # neighbours are of one language
    partner = np.arange(number) ^ 1
    is_pair = (rng.random(number) < 1 / 3) & (partner < number)
    is_pair[is_pair] = lengths["group"][partner[is_pair]] == lengths["group"][is_pair]
    pairs = np.where(is_pair, partner, -1)[:, None].astype(np.int32)
    groups = tuple(("rehearsal", f"language {i}") for i in range(_LANGUAGES))
    shape = (run.model.patch_size, run.model.feat_dim)

    def clips(numbers: Sequence[int]) -> Iterator[Clip]:
        for i in numbers:
            ids, described = (
                rng.integers(105, run.model.lm_config.vocab_size, lengths[name][i], dtype=np.int32)
                for name in ("text", "described")
            )
            latents = rng.standard_normal((lengths["patches"][i], *shape), np.float32)
            yield Clip(ids, latents, described_ids=described if len(described) else None, dataset="rehearsal")

    return Index(lengths, groups, pairs), [clips(part) for part in np.array_split(np.arange(number), shards)]


# ---- plan ------------------------------------------------------------------------------------------------------------


def _plan(directory: pathlib.Path, run: BackboneRun) -> dict:
    """Time and memory of the pack plan at the run's own number of rows and steps."""
    figures = {}

    def timed(name, function, *args):
        begin = time.perf_counter()
        result = function(*args)
        figures[name] = round(time.perf_counter() - begin, 2)
        return result

    source = timed("open_sec", Shards, directory)
    index = source.index
    mix = timed("start_sec", Mix, run.seed, index, source.patch_sec, run.batch, run.stages)
    lines = timed("forecast_sec", forecast, mix, index, run.num_steps, source.patch_sec)
    rows = timed("first_step_sec", mix.rows, 0)
    timed("read_step_sec", lambda: [source[draw.clip] for row in rows for draw in row])
    for number, stage in enumerate(mix.stages[1:], 2):
        timed(f"first_step_of_stage_{number}_sec", mix.rows, stage.first_step)
    timed("heard_sec", mix.heard, run.num_steps)
    figures["open_files"] = len(os.listdir("/proc/self/fd"))
    figures["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
    found = [f"{line}{''.join('; ' + lack for lack in line.lacking)}" for line in lines]
    return figures | {"hours": round(sum(line.hours_heard for line in lines)), "stages": found}


# ---- training --------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """One start of the training."""

    name: str
    workdir: pathlib.Path
    num: int  # processes
    step: int = STEPS  # at this step the last process gets the signal; without a signal, the step at which the run ends
    signal: int | None = None
    arguments: Sequence[str] = ()

    def is_expected(self, codes: Sequence[int]) -> bool:
        """Whether the processes ended as they have to."""
        if self.signal == signal.SIGTERM:
            return set(codes) == {75}
        return not any(codes) if self.signal is None else all(codes)


def _train(harness: Harness, shards: pathlib.Path, processes: int, workers: int) -> tuple[list[dict], list[str]]:
    """Kill one of the processes, stop them, resume with fewer, branch -> (figures of each part, what went wrong)."""
    workdir, branch = harness.directory / "run", harness.directory / "branch"
    long_rows = next(stage.first_step for stage in harness.run.stages if stage.slots_factor > 1)
    killed, stopped, end = _BRANCH + 1, long_rows + 2, _BRANCH + 4
    at_branch = (
        f"--resume-from={workdir / 'checkpoints' / str(_BRANCH)}", f"--config.num_steps={end}",
        f"--config.optim.decay_start={_BRANCH}", f"--config.optim.decay_steps={end - _BRANCH}",
    )  # fmt: skip
    parts = (
        _Part(f"{processes} processes, one killed at step {killed}", workdir, processes, killed, signal.SIGKILL),
        _Part(f"{processes} processes, stopped at step {stopped}", workdir, processes, stopped, signal.SIGTERM),
        _Part(f"{workers} processes, to the end", workdir, workers),
        _Part(f"{workers} processes, a branch from step {_BRANCH}", branch, workers, end, arguments=at_branch),
    )
    figures, problems = [], []
    for part in parts:
        try:
            figure, found = _run(harness, shards, part)
        except RunFailed as failure:
            return figures, [*problems, f"{part.name}: {failure}"]
        figures.append(figure)
        problems += [f"{part.name}: {problem}" for problem in found]
    steps = [row["step"] for row in metric_rows(workdir)]
    if steps != list(range(1, STEPS + 1)):
        problems.append(f"metrics.jsonl has {len(steps)} steps up to {steps[-1]} instead of 1 to {STEPS}, each once")
    return figures, problems


def _run(harness: Harness, shards: pathlib.Path, part: _Part) -> tuple[dict, list[str]]:
    """Runs one part -> (figures, what went wrong)."""
    workdir = part.workdir
    rows = pathlib.Path(workdir) / "metrics.jsonl"
    before = rows.stat().st_mtime_ns if rows.exists() else 0
    saved = max(saved_steps(workdir), default=_BRANCH if part.arguments else 0)
    with (
        harness.children(workdir, f"--data={shards}", *part.arguments, num=part.num) as children,
        _watching(children) as most,
    ):
        for child in children:
            child.limit_open_files(OPEN_FILES)
        begin = time.monotonic()
        has_begun = harness.wait_until(
            lambda: rows.exists() and rows.stat().st_mtime_ns > before and children[0].start_step is not None, children
        )
        first_step_sec = time.monotonic() - begin
        if part.signal is not None:
            has_begun = harness.wait_until(lambda: last_step(workdir) >= part.step, children)
            begin = time.monotonic()
            children[-1].send(part.signal)
        codes = [child.wait() for child in children]
        end_sec = time.monotonic() - begin
        start, output = children[0].start_step, children[0].output
    figure = {
        "part": part.name, "codes": codes, "start_step": start, "step": last_step(workdir),
        "first_step_sec": round(first_step_sec, 1), "end_sec": round(end_sec, 1), **most,
    }  # fmt: skip
    problems = [] if has_begun else ["ended before its time"]
    problems += [] if part.is_expected(codes) else [f"exit codes {codes}: {output[-1500:]}"]
    problems += [] if start == saved else [f"started from step {start} although step {saved} was saved"]
    problems += [] if last_step(workdir) >= part.step else [f"ended at step {last_step(workdir)} instead of {part.step}"]
    problems += [] if most["open_files"] <= OPEN_FILES else [f"{most['open_files']} open files"]
    return figure, problems


@contextlib.contextmanager
def _watching(children: Sequence[Child]) -> Iterator[dict]:
    """The peak memory and the most open files of any of these processes, measured while the block runs."""
    most, is_over = {"peak_mb": 0, "open_files": 0}, threading.Event()

    def watch():
        while not is_over.wait(0.2):
            for child in children:
                for name, value in child.usage().items():
                    most[name] = max(most[name], value)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        is_over.set()
        thread.join()


def _figures(name: str, figures: dict) -> str:
    return f"{name}: " + json.dumps({key: value for key, value in figures.items() if key != "part"})[1:-1].replace('"', "")
