"""Measures the comparison of held-out clips with training clips at the start of `train`.

    python tests/measure_heldout.py [CLIPS [HELDOUT [PARTS]]]      default: 1e7 5e3 200

PARTS is the number of clips that are cut from one file; none of the held-out ones overlaps with a training clip. Prints the
seconds, those of them on a core, and the peak of memory beyond that of the idle process.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
import threading
import time

import numpy as np

from tests.data.test_pipeline import HEADER
from voxcpm2_jax.data.identity import IDENTITY, check_heldout
from voxcpm2_jax.data.shards import IDENTITY_FILE, write_header


def write(directory: pathlib.Path, files: np.ndarray, start_sec: np.ndarray) -> pathlib.Path:
    directory.mkdir()
    table = np.zeros(len(files), IDENTITY)
    table["file"], table["speaker"] = files, files % 20_000 + 1
    table["start_sec"], table["end_sec"] = start_sec, start_sec + 10
    np.save(directory / IDENTITY_FILE, table)
    write_header(directory, dataclasses.replace(HEADER, sources_sha256=directory.name, crc32={IDENTITY_FILE: 0}))
    return directory


def resident_mb() -> float:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def main(num_clips: int = 10**7, num_heldout: int = 5000, parts: int = 200) -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        files = np.repeat(rng.integers(1, 2**63, num_clips // parts + 1, np.uint64), parts)[:num_clips]
        part = np.arange(num_clips) % parts
        training = write(pathlib.Path(name) / "training", files, 10.0 * part)
        chosen = rng.integers(0, num_clips, num_heldout)
        heldout = write(pathlib.Path(name) / "heldout", files[chosen], 10.0 * (part[chosen] + parts))
        del files, part
        before, peak, ended = resident_mb(), [0.0], threading.Event()

        def watch():
            while not ended.wait(0.01):
                peak[0] = max(peak[0], resident_mb())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start, start_cpu = time.monotonic(), time.process_time()
        lines = check_heldout([training], [heldout])
        sec, cpu_sec = time.monotonic() - start, time.process_time() - start_cpu
        ended.set()
        watcher.join()
    print(
        json.dumps(
            {
                "clips": num_clips,
                "sec": round(sec, 1),
                "cpu_sec": round(cpu_sec, 1),
                "mb": round(peak[0] - before),
                "lines": len(lines),
            }
        )
    )


if __name__ == "__main__":
    main(*(int(float(number)) for number in sys.argv[1:]))
