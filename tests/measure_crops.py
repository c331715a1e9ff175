"""Measures that the memory of `train-vae` does not grow with the corpus.

    python -m tests.measure_crops [HOURS ...]      default: 1 10

Each corpus is trained on by its own process for 20 updates of configs/vae.py:tiny; another one only checks the recordings and
makes 300 batches. They are noise, WAV in 24 kHz, a minute each; one in a hundred is missing. Prints the hours, the peak memory
of both processes (that of the first is what the compiler takes), and how much faster than real time recordings are checked
and crops are made, per core.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import soundfile

HZ, SEC, FILES = 24000, 60, 60
PEAK = "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024"
TRAIN = f"""
import json, resource, sys
from voxcpm2_jax.cli.main import main
code = main(["train-vae", "--config=configs/vae.py:tiny", "--data=" + sys.argv[1], "--workdir=" + sys.argv[2]])
print(json.dumps({{"code": code, "peak_mb": {PEAK}}}))
"""
DATA = f"""
import json, resource, sys, time
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.plain import from_dict
from voxcpm2_jax.config.run import VAERun
from voxcpm2_jax.corpus import sources
from voxcpm2_jax.train.crops import Crops, open_files
run = from_dict(VAERun, load_config("configs/vae.py:tiny"))
start = time.process_time()
files = open_files(run.vae, sources.open_corpus(sys.argv[1]), sys.argv[2])
checked, start, crops = time.process_time() - start, time.process_time(), Crops(run, files)
sec = sum(crops.batch(0, i)["input_BA"].size for i in range(300)) / run.vae.sample_rate
speed = round(sec / (time.process_time() - start))
print(json.dumps({{"data_peak_mb": {PEAK}, "check_sec": checked, "crops_x_real_time": speed}}))
"""


def measure(directory: pathlib.Path, hours: float) -> dict:
    lines = []
    for i in range(round(hours * 3600 / SEC)):
        path = directory / f"{i}.wav"
        if i >= FILES:  # other names for the same files
            os.link(directory / f"{i % FILES}.wav", path) if not path.exists() else None
        elif not path.exists():
            soundfile.write(path, 0.1 * np.random.default_rng(i).standard_normal(HZ * SEC), HZ)
        lines.append({"audio": path.name if i % 100 != 99 else "missing.wav", "text": "noise"})
    manifest = directory / f"{hours}.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"hours": hours}
    for name, program in (("data", DATA), ("train", TRAIN)):
        command = [sys.executable, "-c", program, str(manifest), f"{directory}/{name}-{hours}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    assert found.pop("code") == 0, done.stdout
    return found | {"check_x_real_time": round(3600 * hours / found.pop("check_sec"))}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for hours in [float(hours) for hours in sys.argv[1:]] or [1.0, 10.0]:
            print(json.dumps(measure(pathlib.Path(scratch), hours)), flush=True)
