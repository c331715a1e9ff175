"""Faults, injected into real child processes of `voxcpm2-jax train`, on the CPU of this machine, whose results are compared
with those of a run left in peace.

    kills        SIGKILL during start-up, at a step, during a save; the run goes on each time, and ends as the other did
    signals      SIGTERM, SIGINT: saved, exit code 75;  a second one: out at once, nothing durable harmed
    processes    1 -> 2 -> 4 -> 1, each stopped by a signal to any one;  one of two killed: the other does not wait for ever
    files        the newest checkpoint truncated, thinned out, altered, mixed up;  a shard altered;  a disk that is full
    numbers      latents that are not finite: skipped;  two batches in a row: back to the last checkpoint, and past them

The run is made short and full of borders: gradient accumulation, averaged weights, a WSD schedule that begins to decay, a
second stage and an epoch's end all lie within its 40 updates, between saves every 5. "Equal" is every array of the last
checkpoint, bit for bit, and every row of metrics.jsonl but its clocks; across numbers of processes, losses to `_CLOSE`.

    lost steps   updates that were done and had to be done again: at most those since the last save, for each fault
    lost data    saves that were on disk and were not gone on from, rows missing or twice, clips that were not heard: 0

Faults come about from outside alone: signals, limits, files. Nothing in the training code knows of them.
"""

import hashlib
import json
import pathlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

import jax
import numpy as np

from voxcpm2_jax import processes
from voxcpm2_jax.bench.lab import CLOSE, SAVE_EVERY, STEPS, Child, Lab, Outcome, newest_step, rows_of, saved_steps
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.data import packing, synthetic
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.data.shards import LENGTHS_FILE, Header, crc32, write_header, write_shard
from voxcpm2_jax.data.tokenizer import train_tokenizer
from voxcpm2_jax.train import signals
from voxcpm2_jax.vae import autoencoder
from voxcpm2_jax.workdir import codec_sha256, save_codec

DAMAGES = ("truncated", "missing", "bit flipped", "foreign")


# ---- the faults ------------------------------------------------------------------------------------------------------


def kills_in_turn(lab: Lab, *, kinds: Sequence[str], kills: int) -> Outcome:
    """Kills a run again and again, at each kind of moment in turn, and lets it come to its end."""
    problems, lost_steps, lost_data, done, lap = [], 0, 0, 0, 0
    while not problems and (done < kills or not lap):
        workdir = lab.directory / f"killed_{'_'.join(kinds).replace(' ', '_')}_{lap}"
        saved = last = 0  # newest save and newest row of the life before
        is_over = False
        while not is_over:
            with lab.children(workdir) as (child,):
                if done < kills:
                    _await(lab, kinds[done % len(kinds)], workdir, child)
                    is_over = not child.is_running
                    done += not is_over
                else:
                    child.wait()
                    is_over = True
            if child.start is not None:
                lost_steps += max(last - child.start, 0)
                lost_data += child.start < saved
            saved, last = max(saved_steps(workdir), default=0), newest_step(workdir)
        problems = lab.differences(workdir)
        lap += 1
    return Outcome(problems, lost_steps=lost_steps, lost_data=lost_data)


def _await(lab: Lab, kind: str, workdir, child: Child) -> None:
    """Waits for a random moment of that kind."""
    if kind == "start-up":
        time.sleep(lab.rng.uniform(0, lab.start_sec))
        return
    if not lab.until(lambda: child.start is not None, [child]):
        return
    start = child.start
    if kind == "a step":
        goal = start + int(lab.rng.integers(1, SAVE_EVERY + 4))
        lab.until(lambda: newest_step(workdir) >= goal, [child])
        time.sleep(lab.rng.uniform(0, 0.1))
        return
    directory = pathlib.Path(workdir) / "checkpoints"

    def has_begun() -> bool:
        is_under_way = any(not path.name.isdecimal() for path in directory.glob("*"))
        return is_under_way or max(saved_steps(workdir), default=0) > start

    lab.until(has_begun, [child])
    time.sleep(lab.rng.uniform(0, 0.05))


def stopped_by(lab: Lab, *, name: str) -> Outcome:
    """At a random step; it has to be saved, and told by the exit code."""
    workdir = lab.directory / f"stopped_by_{name}"
    problems = []
    with lab.children(workdir) as (child,):
        goal = int(lab.rng.integers(2, STEPS // 2))
        lab.until(lambda: newest_step(workdir) >= goal, [child])
        begin = time.monotonic()
        child.send(signal.Signals[name])
        code, sec = child.wait(), time.monotonic() - begin
        last = newest_step(workdir)
        if code != 75 or max(saved_steps(workdir), default=0) < last:
            problems.append(f"exit code {code}, step {last} done, saved {saved_steps(workdir)}: {child.said[-500:]}")
    lab.finish(workdir)
    return Outcome(problems + lab.differences(workdir), f"saved and gone {sec:.1f} s after it")


def second_signal(lab: Lab) -> Outcome:
    workdir = lab.directory / "stopped_twice"
    problems = []
    with lab.children(workdir) as (child,):
        lab.until(lambda: newest_step(workdir) >= SAVE_EVERY + 2 and saved_steps(workdir), [child])
        saved = max(saved_steps(workdir))
        child.send(signal.SIGTERM)
        lab.until(lambda: "stops at once" in child.said, [child])
        time.sleep(signals.ECHO_SEC)
        begin = time.monotonic()
        child.send(signal.SIGTERM)
        code, sec = child.wait(), time.monotonic() - begin
        last = newest_step(workdir)
        if code not in (128 + signal.SIGTERM, 75):  # 75: it was saved before the second came
            problems.append(f"exit code {code}: {child.said[-500:]}")
    with lab.children(workdir) as (child,):
        if child.wait():
            problems.append(child.said[-1000:])
        lost_data = int(child.start is None or child.start < saved)
        lost_steps = max(last - (child.start or 0), 0)
    problems += lab.differences(workdir)
    note = "all was saved before the second came" if code == 75 else f"gone {sec:.1f} s after the second"
    return Outcome(problems, note, lost_steps, lost_data)


def changing_processes(lab: Lab, *, numbers: Sequence[int]) -> Outcome:
    """Each number of processes for a while; a signal to any one of them stops all between the same two steps."""
    workdir, problems, steps = lab.directory / "processes", [], 4 * len(numbers)
    for turn, num in enumerate(numbers[:-1]):
        with lab.children(workdir, num=num) as children:
            lab.until(lambda goal=4 * (turn + 1) - 1: newest_step(workdir) >= goal, children)
            children[int(lab.rng.integers(num))].send(signal.SIGTERM)
            codes = [child.wait() for child in children]
            if set(codes) != {75}:
                problems.append(f"{num} processes: exit codes {codes}: {children[0].said[-1000:]}")
    steps = max(steps, newest_step(workdir) + 2)
    lab.finish(workdir, f"--config.num_steps={steps}", num=numbers[-1])
    problems += lab.differences(workdir, arrays=False, close=CLOSE, steps=steps)
    return Outcome(problems)


def killed_peer(lab: Lab, *, victim: int) -> Outcome:
    """One of two; the other has to end by itself, for a launcher to start both again."""
    workdir, problems, steps = lab.directory / f"killed_peer_{victim}", [], 2 * SAVE_EVERY
    with lab.children(workdir, num=2) as children:
        lab.until(lambda: newest_step(workdir) > SAVE_EVERY and saved_steps(workdir), children)
        children[victim].send(signal.SIGKILL)
        begin = time.monotonic()
        try:
            code = children[1 - victim].wait(processes.LOST_SEC + 60)
        except subprocess.TimeoutExpired:
            problems.append(f"the other still runs after {processes.LOST_SEC + 60:.0f} s: {children[1 - victim].said[-500:]}")
            code = 1
        sec = time.monotonic() - begin
        if not code:
            problems.append("the other ended as if all were well")
        last = newest_step(workdir)
    said = lab.finish(workdir, f"--config.num_steps={steps}", num=2)
    start = int(re.search(r"starting from step (\d+)", said)[1])
    problems += lab.differences(workdir, arrays=False, close=CLOSE, steps=steps)
    return Outcome(problems, f"the other gone after {sec:.1f} s", lost_steps=last - start)


def damaged_checkpoint(lab: Lab, *, how: str) -> Outcome:
    """It has to be named, and the one before it gone on from."""
    workdir = lab.copy(f"checkpoint_{how.replace(' ', '_')}")
    newest, older = (workdir / "checkpoints" / str(step) for step in (STEPS, STEPS - SAVE_EVERY))
    file = max((path for path in (newest / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "missing":
        file.unlink()
    elif how == "bit flipped":
        place = int(lab.rng.integers(len(content)))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:  # the older step's parameters under the newer one's name
        shutil.rmtree(newest / "params")
        shutil.copytree(older / "params", newest / "params")
    said = lab.finish(workdir)
    problems = [] if f"DAMAGED CHECKPOINT {newest}" in said else [f"it was not named: {said[-1000:]}"]
    problems += [] if f"starting from step {STEPS - SAVE_EVERY} of" in said else ["the one before was not used"]
    return Outcome(problems + lab.differences(workdir), lost_steps=SAVE_EVERY)


def full_disk(lab: Lab) -> Outcome:
    """A limit on the size of files, set while the run is under way: the next save fails. The older one has to be whole."""
    workdir, problems = lab.directory / "full_disk", []
    with lab.children(workdir) as (child,):
        lab.until(lambda: bool(saved_steps(workdir)), [child])
        limit = 4 * (workdir / "metrics.jsonl").stat().st_size  # rows still fit, and parameters do not
        child.limit(max(limit, 1 << 18))
        code = child.wait()
        saved, last = max(saved_steps(workdir)), newest_step(workdir)
        if code != 1 or "could not be saved" not in child.said or f"step {saved} is whole" not in child.said:
            problems.append(f"exit code {code}: {child.said[-1000:]}")
    said = lab.finish(workdir)
    lost_data = int(f"starting from step {saved} of" not in said)
    problems += lab.differences(workdir)
    return Outcome(problems, lost_steps=last - saved, lost_data=lost_data)


# ---- data ------------------------------------------------------------------------------------------------------------


def _write_shards(lab: Lab, directory: pathlib.Path, clips: packing.Source, poisoned: Sequence[int] = ()) -> pathlib.Path:
    """Shards of these clips; the latents of poisoned ones are not finite."""
    model = lab.run.model
    vae = AudioVAEConfig(
        encoder_dim=2, encoder_rates=(20, 32), latent_dim=model.feat_dim, decoder_dim=16, decoder_rates=(48, 40)
    )
    shapes = jax.eval_shape(lambda key: autoencoder.init(key, vae), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)  # never heard
    save_codec(directory, vae, params)
    train_tokenizer(["one two three"] * 9, 288).save(directory / "tokenizer")

    def poison(i: int) -> packing.Clip:
        return clips[i]._replace(patches_MPC=np.full_like(clips[i].patches_MPC, np.nan)) if i in poisoned else clips[i]

    write_shard(directory / "all.array_record", map(poison, range(len(clips))), "float16")
    np.save(directory / LENGTHS_FILE, clips.index.lengths)
    channels = model.feat_dim
    header = Header(
        num_clips=len(clips), hours=1.0, patch_size=model.patch_size, latent_dim=channels, patch_sec=lab.run.patch_sec,
        encoder_hz=vae.sample_rate, decoder_hz=vae.out_sample_rate, codec_sha256=codec_sha256(params, vae),
        tokenizer_sha256=hashlib.sha256((directory / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
        vocab_size=model.lm_config.vocab_size, groups=clips.index.groups, latent_dtype="float16",
        latent_mean=(0.0,) * channels, latent_std=(1.0,) * channels, latent_min=(-4.0,) * channels,
        latent_max=(4.0,) * channels, shards=("all.array_record",), trim_db=-50.0, trim_keep_ms=200.0, sources=("chaos",),
        sources_sha256="", crc32={LENGTHS_FILE: crc32(directory / LENGTHS_FILE)},
    )  # fmt: skip
    write_header(directory, header)
    return directory


def _corpus(run: BackboneRun, num_clips: int) -> packing.Source:
    """Clips that a model of this shape can learn."""
    return synthetic.synthetic_corpus(
        run.seed, num_clips=num_clips, vocab_size=run.model.lm_config.vocab_size, patch_sec=run.patch_sec,
        patch_shape=(run.model.patch_size, run.model.feat_dim), max_patches=run.batch.slots // 2,
    )  # fmt: skip


def altered_shard(lab: Lab) -> Outcome:
    """One bit of one clip: the run must not train on it, and has to name file and clip."""
    shards = _write_shards(lab, lab.directory / "shards_altered", _corpus(lab.run, 64))  # all are heard within a few updates
    file = shards / "all.array_record"
    content = file.read_bytes()
    place = int(lab.rng.integers(len(content) // 4, len(content) // 2))  # amid the records
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    workdir, problems = lab.directory / "altered_shard", []
    with lab.children(workdir, f"--data={shards}") as (child,):
        code = child.wait()
        if code != 2 or not re.search(rf"error: {re.escape(str(file))}: clip \d+ .* cannot be read", child.said):
            problems.append(f"exit code {code}: {child.said[-1000:]}")
    return Outcome(problems)


def bad_numbers(lab: Lab) -> Outcome:
    """Clips whose latents are not finite: one in a batch is skipped, two batches in a row are gone back from.

    The run in peace is one that comes to its end by itself; beside it stands one that is killed after it went back.
    """
    run, problems = lab.run, []
    corpus = _corpus(run, 4096)  # none is heard twice
    mix = Mix(run.seed, corpus.index, run.patch_sec, run.batch, run.stages)
    alone, pair = 7, (12, 13)  # batches; saves at 5 and 10 lie before them
    poisoned = {batch: mix.rows(batch)[0][0].clip for batch in (alone, *pair)}
    heard = [draw.clip for step in range(STEPS) for row in mix.rows(step) for draw in row]
    assert all(heard.count(clip) == 1 for clip in poisoned.values()), "a poisoned clip comes once"
    shards = _write_shards(lab, lab.directory / "shards_poisoned", corpus, tuple(poisoned.values()))
    peace, workdir = lab.directory / "poisoned", lab.directory / "poisoned_and_killed"
    said = lab.finish(peace, f"--data={shards}")
    if f"step {alone + 1}: update skipped, 1 in a row: not finite" not in said or f":{poisoned[alone]}" not in said:
        problems.append("the skipped update or its clip was not named")
    over = [json.loads(line) for line in (peace / "stepped_over.jsonl").read_text().splitlines()]
    if [line["batch"] for line in over] != list(pair) or not all(
        any(clip.endswith(f":{poisoned[line['batch']]}") for clip in line["clips"]) for line in over
    ):
        problems.append(f"passed over: {[line['batch'] for line in over]} instead of {list(pair)}")
    if rows_of(peace)[-1]["skipped"] != 3 or rows_of(peace)[-1]["loss"] is None:
        problems.append(f"the last row counts {rows_of(peace)[-1]['skipped']} skipped updates instead of 3")
    with lab.children(workdir, f"--data={shards}") as (child,):
        lab.until(lambda: "stepping over batches" in child.said, [child])
        child.kill()
    lab.finish(workdir, f"--data={shards}")
    problems += lab.differences(workdir, peace=peace)
    back = pair[-1] + 1 - SAVE_EVERY * (pair[0] // SAVE_EVERY)
    return Outcome(problems, "2 passed over after a way back", lost_steps=back)
