"""Measures that the memory of `prepare` does not grow with the corpus.

    python tests/measure_prepare.py [HOURS ...]      default: 1 10

Each corpus is prepared by its own process, with the codec of configs/vae.py:tiny at random weights. The clips last about
7 s (log-normal) and are noise as loud as speech; one in a hundred is missing. Prints the hours, the clips, the peak memory
of the process and its speed relative to real time.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import soundfile

from voxcpm2_jax import workdir
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.plain import from_dict
from voxcpm2_jax.config.run import VAERun
from voxcpm2_jax.corpus.manifest import Recording, write_manifest
from voxcpm2_jax.vae import autoencoder

HZ, FILES = 16000, 200
CHILD = """
import json, resource, sys
from voxcpm2_jax.cli.main import main
code = main(sys.argv[1:])
print(json.dumps({"code": code, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
"""


def measure(directory: pathlib.Path, hours: float) -> dict:
    rng = np.random.default_rng(0)
    recordings, sec = [], 0.0
    while sec < 3600 * hours:
        i = len(recordings)
        path = directory / f"{i % FILES}.flac"
        if not path.exists():
            length = (7 * np.exp(0.6 * rng.standard_normal())).clip(1, 30)
            soundfile.write(path, 0.1 * rng.standard_normal(int(HZ * length)), HZ)
        is_bad = i % 100 == 99
        text = "".join(rng.choice(list("etaoin shrdlu"), 60))
        recordings.append(Recording(directory / "missing.flac" if is_bad else path, f"a{text}", language="en"))
        sec += 0.0 if is_bad else soundfile.info(path).duration
    manifest = directory / f"{hours}.jsonl"
    write_manifest(manifest, recordings)
    start = time.monotonic()
    arguments = [
        "prepare", "--config=configs/data.py:manifest", f"--config.manifest={manifest}", "--config.vocab_size=300",
        f"--vae={directory}", f"--output={directory}/shards-{hours}",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    child = json.loads(done.stdout.splitlines()[-1])
    assert child["code"] == 0, done.stdout
    wall = time.monotonic() - start
    clips = len(recordings)
    return {"hours": round(sec / 3600, 2), "recordings": clips, "peak_mb": child["peak_mb"], "x_real_time": round(sec / wall)}


def main(all_hours: list[float]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        vae = from_dict(VAERun, load_config("configs/vae.py:tiny")).vae
        workdir.save_codec(directory, vae, autoencoder.init(jax.random.key(0), vae))
        for hours in all_hours:
            print(json.dumps(measure(directory, hours)), flush=True)


if __name__ == "__main__":
    main([float(hours) for hours in sys.argv[1:]] or [1.0, 10.0])
