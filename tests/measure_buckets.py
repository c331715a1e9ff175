"""A whole training in a bucket, through the command line: shards there, train, kill during an upload, resume, export, speak.

    python -m tests.measure_buckets s3|gs

Starts an emulator, so the times say nothing about a real store. One JSON object per line; the last says whether parameters,
losses and the export are those of a run on the local disk, to the last bit.
"""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import fsspec
import numpy as np

from tests.buckets import emulators

STEPS, SAVE_EVERY, KILLED_AT = 12, 4, 8
CONFIG = f"--config=configs/backbone.py:tiny --config.num_steps={STEPS} --config.checkpoint.every_steps={SAVE_EVERY}"


def voxcpm2_jax(command: str, cache: pathlib.Path, **kwargs) -> subprocess.Popen:
    environment = os.environ | {"VOXCPM2_JAX_CACHE": str(cache)}
    return subprocess.Popen([sys.executable, "-m", "voxcpm2_jax", *command.split()], env=environment, **kwargs)


def run(command: str, cache: pathlib.Path) -> dict:
    begin = time.monotonic()
    child = voxcpm2_jax(command, cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = child.communicate()
    assert child.returncode == 0, err
    print(json.dumps({"command": command, "sec": round(time.monotonic() - begin, 1)}), flush=True)
    return json.loads(out.splitlines()[-1])


def make_shards(directory: pathlib.Path) -> None:
    from voxcpm2_jax.bench.corpora import add_models, write_corpus
    from voxcpm2_jax.config.model import MODELS
    from voxcpm2_jax.data.synthetic import Synthetic

    model = MODELS["tiny"]
    shape = (model.patch_size, model.feat_dim)
    source = Synthetic(0, vocab_size=model.lm_config.vocab_size, patch_shape=shape, patch_sec=0.16, max_patches=40)
    clips = [source[i] for i in range(len(source))]
    add_models(directory, write_corpus(directory, model, 0.16, source.index, [clips]))


def losses(text: str) -> list:
    rows = map(json.loads, text.splitlines())
    return [[row[name] for name in ("step", "loss", "loss_diff", "loss_stop")] for row in rows]


def sums(directory: pathlib.Path) -> dict[str, str]:
    files = {path.name: path for path in directory.rglob("*") if path.is_file() and path.name != "upload.json"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


def main(scheme: str) -> None:
    from voxcpm2_jax.buckets import store
    from voxcpm2_jax.buckets.stage import stage
    from voxcpm2_jax.checkpoint import staged
    from voxcpm2_jax.workdir import load_params

    with tempfile.TemporaryDirectory() as scratch, emulators.emulator(scheme) as server:
        root = pathlib.Path(scratch)
        os.environ.update(server.settings | {"VOXCPM2_JAX_CACHE": str(root / "here")})
        fsspec.filesystem(scheme).mkdir("bucket")
        make_shards(root / "shards")
        paths = [path for path in (root / "shards").rglob("*") if path.is_file()]
        store.upload(f"{server.url}/shards", {path.relative_to(root / "shards").as_posix(): path for path in paths})
        run(f"train {CONFIG} --data={root}/shards --workdir={root}/run", root / "here")
        run(f"export-torch {root}/run {root}/exported", root / "here")

        reached, never = threading.Event(), threading.Event()
        mark = f"checkpoints/{KILLED_AT}/checksums.json"
        server.before_write = lambda name: name.endswith(mark) and (reached.set() or never.wait())
        train = f"train {CONFIG} --data={server.url}/shards --workdir={server.url}/run"
        child = voxcpm2_jax(train, root / "first")
        assert reached.wait(600)
        child.kill()
        child.wait()
        server.before_write = lambda name: None
        killed = staged.complete_steps(store.objects(f"{server.url}/run"))
        result = run(train, root / "second")
        run(f"export-torch {server.url}/run {server.url}/exported", root / "third")
        spoken = run(f"generate --text=one --checkpoint={server.url}/exported --output={server.url}/a.wav", root / "third")

        theirs = load_params(staged.local_checkpoint(f"{server.url}/run"))[1]
        same = equal(theirs, load_params(root / "run")[1])
        rows = losses(store.read(f"{server.url}/run/metrics.jsonl").decode())
        never.set()
        print(json.dumps({
            "scheme": scheme, "complete when killed": killed, "step": result["step"], "output": spoken["output"],
            "parameters are the same": same, "losses are the same": rows == losses((root / "run/metrics.jsonl").read_text()),
            "exports are the same": sums(stage(f"{server.url}/exported")) == sums(root / "exported"),
        }))  # fmt: skip


def equal(a: dict, b: dict) -> bool:
    import jax

    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


if __name__ == "__main__":
    main(*sys.argv[1:])
