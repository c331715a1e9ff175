"""Measures the cost of opening recordings: parts of long files, and clips of a data set in TensorFlow's format.

    python -m tests.measure_sources

The files last half an hour at 16 kHz, a part 5 s; the data set has 200 clips of 12 s, stored as 64-bit integers.
"""

import json
import pathlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile
from tensorflow_datasets.core import constants

from tests.corpus.test_datasets import TEXT, sound, write_set
from tests.data.test_audio import FORMATS
from voxcpm2_jax.corpus import sources
from voxcpm2_jax.data import audio

RATE, FILE_SEC, PART_SEC = 16000, 1800, 5
CLIPS, CLIP_SEC = 200, 12


def seconds_of(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure_parts(directory: pathlib.Path) -> dict[str, dict[str, float]]:
    speech_A = 0.1 * np.random.default_rng(0).standard_normal(RATE * 10)
    found = {}
    for suffix, options in FORMATS.items():
        path = directory / f"long.{suffix}"
        with soundfile.SoundFile(path, "w", RATE, 1, **options) as file:
            for _ in range(FILE_SEC // 10):
                file.write(speech_A)
        starts = {"beginning": 1, "middle": FILE_SEC // 2, "end": FILE_SEC - 10}
        cost = {
            f"part at the {name}": min(seconds_of(lambda: audio.load(path, RATE, at, at + PART_SEC)) for _ in range(3))  # noqa: B023
            for name, at in starts.items()
        }
        found[suffix] = cost | {"whole file": seconds_of(lambda: audio.load(path, RATE))}  # noqa: B023
    return found


def measure_set(directory: pathlib.Path) -> dict[str, float]:
    constants.DATA_DIR = str(directory)
    rng = np.random.default_rng(0)
    examples = (
        {"speech": np.round(3000 * rng.standard_normal(RATE * CLIP_SEC)).astype(int), "text": "a"} for _ in range(CLIPS)
    )
    features = {"speech": sound(RATE, "int64"), "text": TEXT}
    write_set(directory / "tedlium/release3/1.0.0", "tedlium", features, list(examples), configName="release3")
    found = sources.open_corpus("tfds:tedlium/release3")
    texts_sec = seconds_of(lambda: [r.text for r in found])
    with ThreadPoolExecutor() as pool:
        audio_sec = seconds_of(lambda: list(sources.in_threads(pool, lambda r: len(audio.load(r.audio, RATE)), found)))
    return {"words of a clip": texts_sec / CLIPS, "audio_sec_per_sec": CLIPS * CLIP_SEC / audio_sec}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        result = {"sec by format": measure_parts(pathlib.Path(name)), "set": measure_set(pathlib.Path(name))}
    print(json.dumps(result, indent=1, default=float))
