"""`prepare` as real processes: one is killed at random moments; two share one output without communicating."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from tests.corpus.codecs import VAE, random_params
from voxcpm2_jax import workdir
from voxcpm2_jax.corpus import manifest
from voxcpm2_jax.data import shards
from voxcpm2_jax.data.tokenizer import train_tokenizer

RECORDINGS, HELDOUT, SHARD_CLIPS = 249, 9, 4
SHARDS = (RECORDINGS - HELDOUT) // SHARD_CLIPS


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    """A manifest with held-out clips and some missing recordings, a codec, a tokenizer, and shards made without a stop."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    recordings = []
    for i in range(RECORDINGS):
        path = directory / f"{i}.wav"
        if i % 37 != 5:  # the others are missing
            soundfile.write(path, 0.2 * rng.standard_normal(rng.integers(1600, 8000)), 16000)
        recordings.append(manifest.Recording(path, f"clip number {i}", language="en" if i % 3 else "de"))
    manifest.write_manifest(directory / "h.jsonl", recordings[:HELDOUT])
    manifest.write_manifest(directory / "m.jsonl", recordings[HELDOUT:])
    workdir.save_codec(directory, VAE, random_params())
    train_tokenizer([r.text for r in recordings], 290).save(directory / "tokenizer")
    straight = start(directory, directory / "straight")
    assert straight.wait(120) == 0
    assert shards.read_header(directory / "straight").num_clips > 200
    return directory


def start(directory, output, *more):
    settings = [
        f"manifest={directory}/m.jsonl", f"heldout={directory}/h.jsonl", f"tokenizer={directory}/tokenizer", "patch_size=2",
        "min_sec=0.05", f"shard_clips={SHARD_CLIPS}", *more,
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "voxcpm2_jax", "prepare", "--config=configs/data.py:manifest", f"--vae={directory}",
        f"--output={output}", *(f"--config.{setting}" for setting in settings),
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(output):
    return len(list(output.glob("shard-*.npz")))


def content(directory):
    """Every file that training reads, by its path."""
    files = [f for f in directory.rglob("*") if f.suffix in (".array_record", ".npy") or f.name == "skipped.jsonl"]
    return {str(f.relative_to(directory)): f.read_bytes() for f in files}


def leftovers(directory):
    return [f for f in directory.rglob(".*") if not f.is_dir()]


def test_killed_at_random_moments_it_loses_and_repeats_nothing(corpus_dir, tmp_path):
    output, draw = tmp_path / "out", random.Random(0)
    seen, kills = [0], 0
    while finished(output) < SHARDS and kills < 12:
        process = start(corpus_dir, output)
        wanted = seen[-1] + draw.randrange(12, 28)
        while process.poll() is None and finished(output) < wanted:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.03)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(60)
        process.stderr.close()
        seen.append(finished(output))
        assert not (output / "header.json").exists() or seen[-1] == SHARDS
    assert kills >= 2 and any(0 < count < SHARDS for count in seen)
    last = start(corpus_dir, output)
    assert last.wait(120) == 0, last.stderr.read().decode()
    last.stderr.close()
    assert content(output) == content(corpus_dir / "straight")
    assert shards.read_header(output) == shards.read_header(corpus_dir / "straight")


def test_two_processes_share_the_work_and_a_third_is_refused(corpus_dir, tmp_path):
    output = tmp_path / "out"
    both = [start(corpus_dir, output, f"host={i}", "num_hosts=2") for i in range(2)]
    while not list(output.glob(".host-0-of-2.*.claim")):
        time.sleep(0.01)
    third = start(corpus_dir, output, "host=0", "num_hosts=2")
    assert third.wait(120) == 2
    message = third.stderr.read().decode()
    third.stderr.close()
    assert message.startswith(f"error: {output}: host 0 of 2, process {both[0].pid} on ") and message.count("\n") == 1
    for process in both:
        assert process.wait(120) == 0, process.stderr.read().decode()
        process.stderr.close()
    assert content(output) == content(corpus_dir / "straight")
    assert shards.read_header(output) == shards.read_header(corpus_dir / "straight")
    assert not leftovers(output)
