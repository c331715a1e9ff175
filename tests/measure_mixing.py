"""Measures what a large corpus costs the plan of its rows: time, memory, and how full the rows are.

    python tests/measure_mixing.py [CLIPS]      default: 1,000,000

Durations are log-normal (median 7 s, sigma 0.6, 1 to 30 s), text has 3.2 tokens a second, in 15 languages of unlike size;
256 rows of 4,096 slots a step.
"""

import json
import resource
import sys
import time

import numpy as np

from voxcpm2_jax.config import BatchConfig
from voxcpm2_jax.data import mixing, packing

SLOTS, ROWS, FAR = 4096, 256, 10**6


def index_of(num_clips: int) -> packing.Index:
    rng = np.random.default_rng(0)
    sec = (7 * np.exp(0.6 * rng.standard_normal(num_clips))).clip(1, 30)
    lengths = np.zeros((num_clips, 6), np.int32)
    lengths[:, packing.TEXT], lengths[:, packing.PATCHES] = np.maximum(1, rng.poisson(3.2 * sec)), np.ceil(6.25 * sec)
    lengths[:, packing.GROUP] = rng.integers(0, 30, num_clips) ** 2 // 60
    return packing.Index(lengths, tuple(("corpus", f"language {i}") for i in range(15)))


def main(num_clips: int) -> None:
    index = index_of(num_clips)
    patches = packing.recommend_patches(packing.sizes(index.lengths[:100_000]), SLOTS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mix = mixing.Mix(0, index, 0.16, BatchConfig(rows=ROWS, slots=SLOTS, patches=patches))

    def seconds(step: int) -> float:
        start = time.perf_counter()
        mix.rows(step)
        return round(time.perf_counter() - start, 4)

    result = {
        "clips": num_clips,
        "first_step_sec": seconds(0),
        "first_far_step_sec": seconds(FAR),
        "next_sec": seconds(FAR + 1),
    }
    rows = [
        packing.sizes(index.lengths[[draw.clip for draw in row]]).sum(axis=0) for step in range(4) for row in mix.rows(step)
    ]
    used = np.mean(rows, axis=0) / (SLOTS, patches, patches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result |= {"slots_used": round(float(used[0]), 4), "patches_used": round(float(used[1]), 4)}
    print(json.dumps(result | {"index_mb": index.lengths.nbytes / 1e6, "plan_mb": round((peak - before) / 1024, 1)}))


if __name__ == "__main__":
    main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10**6)
