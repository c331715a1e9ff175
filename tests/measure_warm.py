"""CPU seconds of the first and the second start of `generate`, and of `generate_batch` with 1 to 16 texts.

    python -m tests.measure_warm DIR [MODEL]          DIR: absent or empty; MODEL: a name of MODELS, default small

CPU seconds are of all threads: other work on the machine hardly changes them. The voice has random weights and the released
codec. Every start is a process of its own; compiled programs go to DIR, which holds none at first. Speech ends after 8
patches (1.28 s).
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

SETTINGS = {"max_len": 8, "min_len": 8, "inference_timesteps": 10, "retry_badcase": False}


def make_voice(directory: pathlib.Path, name: str) -> None:
    from voxcpm2_jax.checkpoint.arrays import nest
    from voxcpm2_jax.config.model import MODELS, AudioVAEConfig
    from voxcpm2_jax.data.tokenizer import train_tokenizer
    from voxcpm2_jax.torch_io import released, tables

    rng, model = np.random.default_rng(0), MODELS[name]
    vae = AudioVAEConfig(latent_dim=model.feat_dim)

    def values(table):
        shapes = {path: (len(group), *group[0].shape) if group[0].layer is not None else group[0].shape
                  for path, group in tables.by_path(table).items() if path}  # fmt: skip
        return nest({path: rng.normal(0.0, 0.02, shape).astype(np.float32) for path, shape in shapes.items()})

    texts = ["one two three four five six seven eight nine ten"]
    parts = values(tables.backbone_table(model)), vae, values(tables.vae_table(vae))
    released.save(directory, model, *parts, train_tokenizer(texts * 4, 340))


def timed(command: list[str], cache: pathlib.Path) -> float:
    """CPU seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    print(done.stdout.splitlines()[-1] if "--batches" in command else "", end="")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def batches(voice: str) -> None:
    """Child: speaks 1, 2 .. 16 texts in a batch -> seconds of each."""
    from voxcpm2_jax.inference.api import VoxCPM

    model, seconds = VoxCPM.from_pretrained(voice), []
    for count in range(1, 17):
        begin = time.process_time()
        model.generate_batch([{"text": "one two three", "seed": i} | SETTINGS for i in range(count)])
        seconds.append(round(time.process_time() - begin, 1))
    print(json.dumps({"generate_batch": seconds, "sum": round(sum(seconds), 1)}))


def main(directory: pathlib.Path, name: str) -> None:
    voice, cache = directory / "voice", directory / "cache"
    make_voice(voice, name)
    command = ["-m", "voxcpm2_jax", "generate", f"--checkpoint={voice}", "--text=one two three", "--seed=1",
               "--max-len=8", "--min-len=8", f"--output={directory}/a.wav"]  # fmt: skip
    starts = [timed(command, cache) for _ in range(2)]
    kept = list(cache.rglob("*")) if cache.exists() else []
    size = sum(path.stat().st_size for path in kept if path.is_file())
    print(json.dumps({"generate": starts, "kept_files": len(kept), "kept_mb": round(size / 1e6, 1)}), flush=True)
    for _ in range(2):
        timed(["-m", "tests.measure_warm", "--batches", str(voice)], cache)
        print(flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--batches":
        batches(sys.argv[2])
    else:
        main(pathlib.Path(sys.argv[1]), *(sys.argv[2:] or ["small"]))
