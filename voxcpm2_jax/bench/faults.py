"""The faults that `chaos` injects, one function each; each checks the result against the control run.

    repeated_kills           SIGKILL during start-up, a step or a save, again and again; the run resumes each time
    stop_signal              SIGTERM or SIGINT: the run saves and exits with 75
    second_signal            SIGTERM twice: the process ends at once, and no complete checkpoint is harmed
    changing_process_count   1 -> 2 -> 4 -> 1 processes, each time stopped by a signal to one of them
    killed_peer              SIGKILL of one of two processes: the other ends by itself
    slow_peer                one of two processes stopped for a moment again and again: named, and the losses stay
    damaged_checkpoint       the newest checkpoint truncated, without a file, with a flipped bit, or with files of another step
    full_disk                a save fails; the older checkpoint stays complete
    altered_shard            a flipped bit in a data shard: named, and not trained on
    non_finite_latents       the update of one bad batch is skipped; two in a row cause a rollback and are stepped over

Each takes a `Harness` and returns an `Outcome`. chaos.py says what "survived" and "lost" mean.
"""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

import numpy as np

from voxcpm2_jax import processes
from voxcpm2_jax.bench.corpora import add_models, write_corpus
from voxcpm2_jax.bench.harness import (
    LOSS_TOLERANCE,
    SAVE_EVERY,
    STEPS,
    Child,
    Harness,
    Outcome,
    last_step,
    metric_rows,
    saved_steps,
)
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.data import synthetic
from voxcpm2_jax.data.clips import Clip, Source
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.train import signals

DAMAGES = ("truncated", "file missing", "bit flipped", "files exchanged")


# ---- kills and signals -----------------------------------------------------------------------------------------------


def repeated_kills(harness: Harness, *, moments: Sequence[str], kills: int) -> Outcome:
    """Kills a run again and again, at each of the moments in turn; a run that reaches its end is followed by another."""
    problems, lost_steps, lost_data, done, num_runs = [], 0, 0, 0, 0
    while not problems and (done < kills or not num_runs):
        workdir = harness.directory / f"killed_{'_'.join(moments).replace(' ', '_')}_{num_runs}"
        saved = last = 0  # newest checkpoint and newest row of the process before
        is_over = False
        while not is_over:
            with harness.children(workdir) as (child,):
                if done < kills:
                    _wait_for(harness, moments[done % len(moments)], workdir, child)
                    is_over = not child.is_running
                    done += not is_over
                else:
                    child.wait()
                    is_over = True
            if child.start_step is not None:
                lost_steps += max(last - child.start_step, 0)
                lost_data += child.start_step < saved
            saved, last = max(saved_steps(workdir), default=0), last_step(workdir)
        problems = harness.differences(workdir)
        num_runs += 1
    return Outcome(problems, lost_steps=lost_steps, lost_data=lost_data)


def _wait_for(harness: Harness, moment: str, workdir, child: Child) -> None:
    """Waits for a random time within "start-up", "a step" or "a save"."""
    if moment == "start-up":
        time.sleep(harness.rng.uniform(0, harness.start_sec))
        return
    if not harness.wait_until(lambda: child.start_step is not None, [child]):
        return
    start = child.start_step
    if moment == "a step":
        goal = start + int(harness.rng.integers(1, SAVE_EVERY + 4))
        harness.wait_until(lambda: last_step(workdir) >= goal, [child])
        time.sleep(harness.rng.uniform(0, 0.1))
        return
    directory = pathlib.Path(workdir) / "checkpoints"

    def has_begun() -> bool:
        is_under_way = any(not path.name.isdecimal() for path in directory.glob("*"))
        return is_under_way or max(saved_steps(workdir), default=0) > start

    harness.wait_until(has_begun, [child])
    time.sleep(harness.rng.uniform(0, 0.05))


def stop_signal(harness: Harness, *, name: str) -> Outcome:
    """Sends one signal at a random step: the run has to save that step and exit with 75."""
    workdir = harness.directory / f"stopped_by_{name}"
    problems = []
    with harness.children(workdir) as (child,):
        goal = int(harness.rng.integers(2, STEPS // 2))
        harness.wait_until(lambda: last_step(workdir) >= goal, [child])
        begin = time.monotonic()
        child.send(signal.Signals[name])
        code, sec = child.wait(), time.monotonic() - begin
        last = last_step(workdir)
        if code != 75 or max(saved_steps(workdir), default=0) < last:
            problems.append(f"exit code {code}, step {last} done, saved {saved_steps(workdir)}: {child.output[-500:]}")
    harness.run_to_end(workdir)
    return Outcome(problems + harness.differences(workdir), f"saved and ended in {sec:.1f} s")


def second_signal(harness: Harness) -> Outcome:
    """Sends SIGTERM twice: the process has to end at once, and to resume from the newest complete checkpoint."""
    workdir = harness.directory / "stopped_twice"
    problems = []
    with harness.children(workdir) as (child,):
        harness.wait_until(lambda: last_step(workdir) >= SAVE_EVERY + 2 and saved_steps(workdir), [child])
        saved = max(saved_steps(workdir))
        child.send(signal.SIGTERM)
        harness.wait_until(lambda: "stops at once" in child.output, [child])
        time.sleep(signals.ECHO_SEC)
        begin = time.monotonic()
        child.send(signal.SIGTERM)
        code, sec = child.wait(), time.monotonic() - begin
        last = last_step(workdir)
        if code not in (128 + signal.SIGTERM, 75):  # 75: the save ended before the second signal
            problems.append(f"exit code {code}: {child.output[-500:]}")
    with harness.children(workdir) as (child,):
        if child.wait():
            problems.append(child.output[-1000:])
        lost_data = int(child.start_step is None or child.start_step < saved)
        lost_steps = max(last - (child.start_step or 0), 0)
    problems += harness.differences(workdir)
    note = "saved before the second signal" if code == 75 else f"ended {sec:.1f} s after the second signal"
    return Outcome(problems, note, lost_steps, lost_data)


# ---- several processes -----------------------------------------------------------------------------------------------


def changing_process_count(harness: Harness, *, numbers: Sequence[int]) -> Outcome:
    """Resumes on another number of processes, again and again; a signal to any one of them has to stop all."""
    workdir, problems, steps = harness.directory / "processes", [], 4 * len(numbers)
    for turn, num in enumerate(numbers[:-1]):
        with harness.children(workdir, num=num) as children:
            harness.wait_until(lambda goal=4 * (turn + 1) - 1: last_step(workdir) >= goal, children)
            children[int(harness.rng.integers(num))].send(signal.SIGTERM)
            codes = [child.wait() for child in children]
            if set(codes) != {75}:
                problems.append(f"{num} processes: exit codes {codes}: {children[0].output[-1000:]}")
    steps = max(steps, last_step(workdir) + 2)
    harness.run_to_end(workdir, f"--config.num_steps={steps}", num=numbers[-1])
    problems += harness.differences(workdir, arrays=False, tolerance=LOSS_TOLERANCE, steps=steps)
    return Outcome(problems)


def killed_peer(harness: Harness, *, victim: int) -> Outcome:
    """Kills one of two processes: the other has to end by itself, so that a launcher can start both again."""
    workdir, problems, steps = harness.directory / f"killed_peer_{victim}", [], 2 * SAVE_EVERY
    with harness.children(workdir, num=2) as children:
        harness.wait_until(lambda: last_step(workdir) > SAVE_EVERY and saved_steps(workdir), children)
        children[victim].send(signal.SIGKILL)
        begin = time.monotonic()
        try:
            code = children[1 - victim].wait(processes.LOST_SEC + 60)
        except subprocess.TimeoutExpired:
            problems.append(f"the other still runs after {processes.LOST_SEC + 60:.0f} s: {children[1 - victim].output[-500:]}")
            code = 1
        sec = time.monotonic() - begin
        if not code:
            problems.append("the other process ended with exit code 0")
        last = last_step(workdir)
    output = harness.run_to_end(workdir, f"--config.num_steps={steps}", num=2)
    start = int(re.search(r"starting from step (\d+)", output)[1])
    problems += harness.differences(workdir, arrays=False, tolerance=LOSS_TOLERANCE, steps=steps)
    return Outcome(problems, f"the other ended after {sec:.1f} s", lost_steps=last - start)


def slow_peer(harness: Harness, *, victim: int) -> Outcome:
    """Stops one of two processes for a moment again and again: the run has to name it, and no other."""
    workdir, steps = harness.directory / f"slow_peer_{victim}", 2 * SAVE_EVERY
    with harness.children(workdir, f"--config.num_steps={steps}", num=2) as children:
        harness.wait_until(lambda: last_step(workdir) >= 2, children)
        step_sec = metric_rows(workdir)[-1]["step_sec"]
        while all(child.is_running for child in children):
            children[victim].send(signal.SIGSTOP)
            time.sleep(max(step_sec, 0.2))
            children[victim].send(signal.SIGCONT)
            time.sleep(0.7 * step_sec)  # so that no step is without a stop
        codes = [child.wait() for child in children]
        named = re.findall(r"^process (\d+) of 2 on .* slows the run down", children[0].output, re.MULTILINE)
    problems = [] if codes == [0, 0] else [f"exit codes {codes}: {children[0].output[-1000:]}"]
    problems += [] if set(named) == {str(victim)} else [f"process {victim} was slow, named were {named or 'none'}"]
    return Outcome(problems + harness.differences(workdir, arrays=False, tolerance=LOSS_TOLERANCE, steps=steps))


# ---- files -----------------------------------------------------------------------------------------------------------


def damaged_checkpoint(harness: Harness, *, how: str) -> Outcome:
    """Damages the newest checkpoint of a finished run: it has to be named, and the run has to resume from the one before."""
    workdir = harness.copy_control(f"checkpoint_{how.replace(' ', '_')}")
    newest, older = (workdir / "checkpoints" / str(step) for step in (STEPS, STEPS - SAVE_EVERY))
    file = max((path for path in (newest / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "file missing":
        file.unlink()
    elif how == "bit flipped":
        place = int(harness.rng.integers(len(content)))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:  # the older step's parameters under the newer one's name
        shutil.rmtree(newest / "params")
        shutil.copytree(older / "params", newest / "params")
    output = harness.run_to_end(workdir)
    problems = [] if f"DAMAGED CHECKPOINT {newest}" in output else [f"the damaged checkpoint was not named: {output[-1000:]}"]
    problems += [] if f"starting from step {STEPS - SAVE_EVERY} of" in output else ["the checkpoint before it was not used"]
    return Outcome(problems + harness.differences(workdir), lost_steps=SAVE_EVERY)


def full_disk(harness: Harness) -> Outcome:
    """Limits the size of files during the run, so that the next save fails: the checkpoint before has to stay complete."""
    workdir, problems = harness.directory / "full_disk", []
    with harness.children(workdir) as (child,):
        harness.wait_until(lambda: bool(saved_steps(workdir)), [child])
        limit = 4 * (workdir / "metrics.jsonl").stat().st_size  # enough for metrics, too little for parameters
        child.limit_file_size(max(limit, 1 << 18))
        code = child.wait()
        saved, last = max(saved_steps(workdir)), last_step(workdir)
        if code != 1 or "could not be saved" not in child.output or f"step {saved} is whole" not in child.output:
            problems.append(f"exit code {code}: {child.output[-1000:]}")
    output = harness.run_to_end(workdir)
    lost_data = int(f"starting from step {saved} of" not in output)
    problems += harness.differences(workdir)
    return Outcome(problems, lost_steps=last - saved, lost_data=lost_data)


# ---- data ------------------------------------------------------------------------------------------------------------


def _write_shards(harness: Harness, directory: pathlib.Path, clips: Source, poisoned: Sequence[int] = ()) -> pathlib.Path:
    """Shards of these clips; the latents of those in `poisoned` are NaN."""

    def poison(i: int) -> Clip:
        return clips[i]._replace(patches_MPC=np.full_like(clips[i].patches_MPC, np.nan)) if i in poisoned else clips[i]

    shards = [map(poison, range(len(clips)))]
    add_models(directory, write_corpus(directory, harness.run.model, harness.run.patch_sec, clips.index, shards))
    return directory


def _corpus(run: BackboneRun, num_clips: int) -> Source:
    """Synthetic clips of the model's shape."""
    return synthetic.Synthetic(
        run.seed, num_clips=num_clips, vocab_size=run.model.lm_config.vocab_size, patch_sec=run.patch_sec,
        patch_shape=(run.model.patch_size, run.model.feat_dim), max_patches=run.batch.slots // 2,
    )  # fmt: skip


def altered_shard(harness: Harness) -> Outcome:
    """Flips a bit in a clip of a shard: the run has to end with an error that names file and clip."""
    corpus = _corpus(harness.run, 64)  # so few clips that every one is read within a few updates
    shards = _write_shards(harness, harness.directory / "shards_altered", corpus)
    (file,) = shards.glob("*.array_record")
    content = file.read_bytes()
    place = int(harness.rng.integers(len(content) // 4, len(content) // 2))  # within the records
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    workdir, problems = harness.directory / "altered_shard", []
    with harness.children(workdir, f"--data={shards}") as (child,):
        code = child.wait()
        if code != 2 or not re.search(rf"error: {re.escape(str(file))}: clip \d+ .* cannot be read", child.output):
            problems.append(f"exit code {code}: {child.output[-1000:]}")
    return Outcome(problems)


def non_finite_latents(harness: Harness) -> Outcome:
    """Trains on clips with NaN latents: one bad batch has to be skipped, two in a row have to cause a rollback.

    The control run of this fault trains on the same clips; a second run is killed after its rollback and has to agree.
    """
    run, problems = harness.run, []
    corpus = _corpus(run, 4096)  # large enough that no clip comes twice
    mix = Mix(run.seed, corpus.index, run.patch_sec, run.batch, run.stages)
    alone, pair = 7, (12, 13)  # batches, soon after the checkpoints of steps 5 and 10
    poisoned = {batch: mix.rows(batch)[0][0].clip for batch in (alone, *pair)}
    drawn = [draw.clip for step in range(STEPS) for row in mix.rows(step) for draw in row]
    assert all(drawn.count(clip) == 1 for clip in poisoned.values()), "each poisoned clip comes once"
    shards = _write_shards(harness, harness.directory / "shards_poisoned", corpus, tuple(poisoned.values()))
    control, workdir = harness.directory / "poisoned", harness.directory / "poisoned_and_killed"
    output = harness.run_to_end(control, f"--data={shards}")
    if f"step {alone + 1}: update skipped, 1 in a row: not finite" not in output or f":{poisoned[alone]}" not in output:
        problems.append("the skipped update or its clip was not named")
    over = [json.loads(line) for line in (control / "stepped_over.jsonl").read_text().splitlines()]
    if [line["batch"] for line in over] != list(pair) or not all(
        any(clip.endswith(f":{poisoned[line['batch']]}") for clip in line["clips"]) for line in over
    ):
        problems.append(f"stepped over: {[line['batch'] for line in over]} instead of {list(pair)}")
    if metric_rows(control)[-1]["skipped"] != 3 or metric_rows(control)[-1]["loss"] is None:
        problems.append(f"the last row counts {metric_rows(control)[-1]['skipped']} skipped updates instead of 3")
    with harness.children(workdir, f"--data={shards}") as (child,):
        harness.wait_until(lambda: "stepping over batches" in child.output, [child])
        child.kill()
    harness.run_to_end(workdir, f"--data={shards}")
    problems += harness.differences(workdir, control=control)
    back = pair[-1] + 1 - SAVE_EVERY * (pair[0] // SAVE_EVERY)
    return Outcome(problems, "2 batches stepped over after a rollback", lost_steps=back)
