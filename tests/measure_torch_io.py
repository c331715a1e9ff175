"""Peak memory of import-torch and export-torch at full size, and whether the files come back byte for byte.

    python tests/measure_torch_io.py DIR          DIR: absent or empty, about 30 GB free

Makes a random checkpoint of the released shape (577 tensors, 4.58 GB of bfloat16; random bytes, so nothing compresses)
with its codec and a small tokenizer, imports it, exports it and compares the files; then exports it in float32, and that in
bfloat16 again. Memory is the anonymous memory of
this process (RssAnon, without mapped files), sampled every 10 ms; it includes Python and its libraries.
"""

import dataclasses
import filecmp
import json
import pathlib
import sys
import threading
import time
from functools import partial

import numpy as np

from voxcpm2_jax.config.model import AudioVAEConfig, DiTConfig, LMConfig, LocalConfig, ModelConfig
from voxcpm2_jax.config.released import to_released
from voxcpm2_jax.convert import export_torch, import_torch
from voxcpm2_jax.data.tokenizer import train_tokenizer
from voxcpm2_jax.torch_io import files, tables


def released_shape() -> ModelConfig:
    lm = LMConfig(kv_channels=128, use_mup=False)
    return ModelConfig(
        lm_config=lm,
        residual_lm_no_rope=True,
        encoder_config=LocalConfig(num_layers=12, kv_channels=128),
        dit_config=DiTConfig(num_layers=12, kv_channels=128),
    )


def write_random(directory: pathlib.Path, model: ModelConfig, vae: AudioVAEConfig, dtype: str) -> int:
    """Writes a released directory of random bits -> the bytes of its tensors. `dtype`: of the backbone, a name of DTYPES."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_released(model, vae), indent=2) + "\n")
    train_tokenizer(["one two three four"] * 4, 300).save(directory)
    rng = np.random.default_rng(0)
    for name, table, kind in (
        (files.BACKBONE_FILE, tables.backbone_table(model), dtype),
        (files.VAE_FILE, tables.vae_table(vae), "F32"),
    ):
        header = {row.name: (files.DTYPES[kind if row.path else "I32"], row.torch_shape) for row in table}

        def tensors(header=header):
            for tensor_name, (kind, shape) in header.items():
                if kind == np.int32:
                    yield tensor_name, np.array(vae.sr_bin_boundaries, np.int32)
                else:
                    yield tensor_name, np.frombuffer(rng.bytes(kind.itemsize * int(np.prod(shape))), kind).reshape(shape)

        files.write_safetensors(directory / name, header, tensors())
    return sum((directory / name).stat().st_size for name in (files.BACKBONE_FILE, files.VAE_FILE))


def anonymous_gb() -> float:
    """The anonymous memory of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024 / 1e9


@dataclasses.dataclass
class Peak:
    """Largest RssAnon while the block runs."""

    gigabytes: float = 0.0
    seconds: float = 0.0

    def __enter__(self):
        self._start, self._stop = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._start

    def _sample(self):
        while not self._stop.wait(0.01):
            self.gigabytes = max(self.gigabytes, anonymous_gb())


def main(directory: pathlib.Path) -> None:
    source, workdir, back = directory / "source", directory / "workdir", directory / "back"
    write_random(source, released_shape(), AudioVAEConfig(), "BF16")
    figures = {}
    for what, convert, *paths in (
        ("import", import_torch, source, workdir),
        ("export", export_torch, workdir, back),
        ("export_float32", partial(export_torch, dtype="float32"), workdir, directory / "float32"),
        ("export_bfloat16", partial(export_torch, dtype="bfloat16"), directory / "float32", directory / "bfloat16"),
    ):
        with Peak() as peak:
            parts = convert(*paths)
        written = parts and {"bytes": parts["backbone"]["bytes"] + parts["codec"]["bytes"]}
        figures[what] = (written or {}) | {"peak_anonymous_gb": round(peak.gigabytes, 2), "seconds": round(peak.seconds, 1)}
    names = ("config.json", files.BACKBONE_FILE, files.VAE_FILE, "tokenizer.json")
    figures["files_equal"] = all(filecmp.cmp(source / name, back / name, shallow=False) for name in names)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
