"""Measures that the memory of `train-vae` does not grow with the corpus.

    python -m tests.measure_crops [HOURS ...]      default: 1 10

Each corpus is trained on by its own process for 20 updates of configs/vae.py:tiny. Its recordings are noise, WAV in 24 kHz, a
minute each; one in a hundred is missing. Prints the hours, the peak memory of the process, how much faster than real time
the recordings were decoded and checked at the start, and the seconds of crops that batches are made of per second and core.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile

from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.plain import from_dict
from voxcpm2_jax.config.run import VAERun
from voxcpm2_jax.corpus import sources
from voxcpm2_jax.train.crops import Crops, open_files

HZ, SEC, FILES = 24000, 60, 60
CHILD = """
import json, resource, sys
from voxcpm2_jax.cli.main import main
code = main(sys.argv[1:])
print(json.dumps({"code": code, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
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
    arguments = ["train-vae", "--config=configs/vae.py:tiny", f"--data={manifest}", f"--workdir={directory}/run-{hours}"]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    child = json.loads(done.stdout.splitlines()[-1])
    assert child["code"] == 0, done.stdout
    run, corpus = from_dict(VAERun, load_config("configs/vae.py:tiny")), sources.open_corpus(manifest)
    start = time.process_time()
    files = open_files(run.vae, corpus, directory / f"again-{hours}")
    checked = time.process_time() - start
    crops = Crops(run, files)
    start = time.process_time()
    seconds = sum(crops.batch(0, i)["input_BA"].size for i in range(50)) / run.vae.sample_rate
    made = time.process_time() - start
    return {
        "hours": hours, "peak_mb": child["peak_mb"], "check_x_real_time": round(3600 * hours / checked),
        "crops_x_real_time": round(seconds / made),
    }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for hours in [float(hours) for hours in sys.argv[1:]] or [1.0, 10.0]:
            print(json.dumps(measure(pathlib.Path(scratch), hours)), flush=True)
