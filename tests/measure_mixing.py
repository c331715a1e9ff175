"""Measures what a large corpus costs the plan of its rows: time, memory, and how full the rows are.

    python tests/measure_mixing.py [CLIPS[:FROM:TO] ...]      default: 1,000,000

Durations are log-normal (median 7 s, sigma 0.6, 1 to 30 s), or even from FROM to TO seconds. Text has 3.2 tokens per second, in
15 languages of different size; 256 rows of 4,096 slots per step. Prints one JSON object for each corpus, measured in a process
of its own. Times are those of its CPU, on which other processes have no influence:

    start_sec            until the plan is ready                   first_step_sec   rows of the first step: packs an epoch
    first_far_step_sec   then step 10^6: makes all packings that are left
    step_sec             then the slowest of 20 steps between 0 and 10^7
    heard_sec            what the model saw before step 10^6
    index_mb, plan_mb    memory that stays                         peak_mb          the most that was used beside the index
"""

import json
import multiprocessing
import os
import resource
import sys
import time

import numpy as np

from voxcpm2_jax.config.run import BatchConfig
from voxcpm2_jax.data import mixing, packing
from voxcpm2_jax.data.clips import LENGTHS, Index

SLOTS, ROWS, FAR = 4096, 256, 10**6


def index_of(num_clips: int, bounds_sec: list[float]) -> Index:
    rng = np.random.default_rng(0)
    lengths = np.zeros(num_clips, LENGTHS)
    for part in np.array_split(np.arange(num_clips), max(1, num_clips // 100_000)):
        if bounds_sec:
            sec = rng.uniform(*bounds_sec, len(part))
        else:
            sec = (7 * np.exp(0.6 * rng.standard_normal(len(part)))).clip(1, 30)
        lengths["text"][part] = np.maximum(1, rng.poisson(3.2 * sec))
        lengths["patches"][part] = np.ceil(6.25 * sec)
        lengths["group"][part] = rng.integers(0, 30, len(part)) ** 2 // 60
    return Index(lengths, tuple(("corpus", f"language {i}") for i in range(15)))


def memory_mb() -> tuple[float, float]:
    """Of this process: now, and at most so far."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return now / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(corpus: str) -> None:
    num_clips, *bounds_sec = map(float, corpus.split(":"))
    index = index_of(int(num_clips), bounds_sec)
    patches = packing.recommend_patches(packing.sizes(index.lengths[:100_000]), SLOTS)
    before, _ = memory_mb()

    def seconds(function, *args) -> float:
        start = time.process_time()
        function(*args)
        return round(time.process_time() - start, 4)

    start = time.process_time()
    mix = mixing.Mix(0, index, 0.16, BatchConfig(rows=ROWS, slots=SLOTS, patches=patches))
    result = {
        "corpus": corpus,
        "start_sec": round(time.process_time() - start, 2),
        "first_step_sec": seconds(mix.rows, 0),
        "first_far_step_sec": seconds(mix.rows, FAR),
        "step_sec": max(seconds(mix.rows, int(step)) for step in np.random.default_rng(0).integers(0, 10**7, 20)),
        "heard_sec": seconds(mix.heard, FAR),
    }
    after, peak = memory_mb()
    rows = [
        packing.sizes(index.lengths[[draw.clip for draw in row]]).sum(axis=0) for step in range(4) for row in mix.rows(step)
    ]
    used = np.mean(rows, axis=0) / packing.Budgets(SLOTS, patches, patches)
    result |= {"slots_used": round(float(used[packing.SLOTS]), 4), "patches_used": round(float(used[packing.PATCHES]), 4)}
    result |= {"index_mb": round(index.lengths.nbytes / 1e6), "plan_mb": round(after - before), "peak_mb": round(peak - before)}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["1e6"]:
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(argument,))
        process.start()
        process.join()
