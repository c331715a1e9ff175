"""Memory and time of `VoxCPM.from_pretrained` at full size.

    python -m tests.measure_load DIR          DIR: absent or empty, about 25 GB free

Makes random checkpoints of the released shape (2.29 B parameters and the codec): a released directory in bfloat16, the workdir
that import-torch makes of it, and a released directory in float32. Each is loaded in a process of its own. Memory is the
anonymous memory of that process (RssAnon, without mapped files) beyond what it has before loading, when Python and the
libraries are there; on a CPU that is the memory of host and device together. On an accelerator its own peak is printed too.
"""

import json
import pathlib
import subprocess
import sys

from tests.measure_torch_io import Peak, anonymous_gb, released_shape, write_random
from voxcpm2_jax.config.model import AudioVAEConfig
from voxcpm2_jax.convert import import_torch


def load(directory: str) -> None:
    import jax

    import voxcpm2_jax.inference.api
    import voxcpm2_jax.workdir

    jax.block_until_ready(jax.numpy.zeros(1))
    before = anonymous_gb()
    with Peak() as peak:
        model = voxcpm2_jax.inference.api.VoxCPM.from_pretrained(directory)
    figures = {"peak_gb": round(peak.gigabytes - before, 2), "steady_gb": round(anonymous_gb() - before, 2)}
    device = jax.local_devices()[0].memory_stats() or {}
    figures |= {name: round(device[name] / 1e9, 2) for name in ("peak_bytes_in_use", "bytes_in_use") if name in device}
    held = sum(x.nbytes for x in jax.tree.leaves([model._params, model._vae_params]))
    print(json.dumps(figures | {"held_gb": round(held / 1e9, 2), "seconds": round(peak.seconds, 1)}))


def main(directory: pathlib.Path) -> None:
    model, vae = released_shape(), AudioVAEConfig()
    for name, dtype in (("bfloat16", "BF16"), ("float32", "F32")):
        size = write_random(directory / name, model, vae, dtype)
        measure(directory / name, size)
        if dtype == "BF16":
            import_torch(directory / name, directory / "workdir")
            measure(directory / "workdir", size)


def measure(checkpoint: pathlib.Path, size: int) -> None:
    process = [sys.executable, "-m", "tests.measure_load", "--load", str(checkpoint)]
    figures = json.loads(subprocess.run(process, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    print(json.dumps({"checkpoint": checkpoint.name, "weights_gb": round(size / 1e9, 2)} | figures), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--load":
        load(sys.argv[2])
    else:
        main(pathlib.Path(sys.argv[1]))
