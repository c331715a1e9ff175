"""What a save costs the training loop, and what writing and verifying checksums costs.

    python -m tests.measure_checkpoint [BLOCKS]          BLOCKS: pairs of blocks of 100 steps, by default 5

Trains configs/backbone.py:tiny in blocks of 100 steps; every second block begins with a save. It reports how long `save`
blocks the loop, and how much processor time a save takes in all threads, background work included, both as shares of a
block without a save. Then it writes and verifies the checksums of 1 GB in files of 128 MB. At last four processes save 1 GB
that is split over them, twice, and each counts the bytes that it reads for checksums, and in a restore onto one replica of four
devices and onto two replicas of two.
"""

import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from functools import partial

import jax
import numpy as np

from tests.processes import run_processes
from voxcpm2_jax import sharding
from voxcpm2_jax.checkpoint import integrity, manager
from voxcpm2_jax.cli.configs import load_config
from voxcpm2_jax.config.plain import from_dict
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.data import pipeline, synthetic
from voxcpm2_jax.data.mixing import Mix
from voxcpm2_jax.train import backbone

STEPS = 100


def save_cost(directory: pathlib.Path, blocks: int) -> dict:
    config = from_dict(BackboneRun, load_config("configs/backbone.py:tiny"))
    model, mesh = config.model, sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    source = synthetic.Synthetic(
        config.seed,
        vocab_size=model.lm_config.vocab_size,
        patch_shape=(model.patch_size, model.feat_dim),
        max_patches=config.batch.slots // 2,
    )
    jax.set_mesh(mesh)
    batch = jax.device_put(pipeline.host_rows(source, Mix(0, source.index, source.patch_sec, config.batch), 0))
    step = backbone.jit_train_step(config, mesh)
    state = jax.jit(partial(backbone.init_state, config))()
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    checkpoints = manager.Checkpoints(directory, keep=2, every_steps=STEPS)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    blocked, durable = [], []
    for block in range(2 * blocks + 2):
        is_saved = block % 2 == 1
        begin, cpu = time.perf_counter(), time.process_time()
        if is_saved:
            checkpoints.save(block, state, {"config": {}})
            blocked.append(time.perf_counter() - begin)
        for _ in range(STEPS):
            state, figures = step(state, batch)
            jax.block_until_ready(figures)
            checkpoints.check()
            if is_saved and len(durable) < len(blocked) and checkpoints.latest_step() == block:
                durable.append(time.perf_counter() - begin)
        seconds[is_saved].append(time.perf_counter() - begin)
        processor[is_saved].append(time.process_time() - cpu)
    checkpoints.close()
    plain, cpu, cpu_saved = (statistics.median(x[1:]) for x in (seconds[False], processor[False], processor[True]))
    return {
        "state_mb": round(size / 1e6, 2),
        "step_ms": round(1e3 * plain / STEPS, 1),
        "save_blocks_ms": round(1e3 * statistics.median(blocked[1:]), 1),
        "save_blocks_percent": round(100 * statistics.median(blocked[1:]) / plain, 2),
        "step_cpu_ms": round(1e3 * cpu / STEPS, 1),
        "save_cpu_ms": round(1e3 * (cpu_saved - cpu), 1),
        "save_cpu_percent": round(100 * (cpu_saved / cpu - 1), 2),
        "durable_after_ms": round(1e3 * statistics.median(durable[1:]), 1),
    }


def checksum_cost(directory: pathlib.Path) -> dict:
    step = directory / "checkpoints" / "1"
    (step / "params").mkdir(parents=True)
    for i in range(8):
        (step / "params" / str(i)).write_bytes(os.urandom(1 << 27))
    figures = {}
    for name, work in (("write_checksums", integrity.write_checksums), ("verify", integrity.find_damage)):
        begin, cpu = time.perf_counter(), time.process_time()
        work(step)
        figures[f"{name}_gb_per_sec"] = round((1 << 30) / 1e9 / (time.perf_counter() - begin), 2)
        figures[f"{name}_gb_per_cpu_sec"] = round((1 << 30) / 1e9 / (time.process_time() - cpu), 2)
    return figures


_SAVE = """
import dataclasses, json, sys
import jax, numpy as np
from typing import Any
from voxcpm2_jax import processes
from voxcpm2_jax.checkpoint import arrays, integrity
from voxcpm2_jax.checkpoint.manager import Checkpoints

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: Any

processes.connect()
crc32, read = integrity._crc32, []
integrity._crc32 = lambda path: read.append(path.stat().st_size) or crc32(path)
num = jax.process_count()

def characters_read():  # by this process, from disk or page cache
    return int(open("/proc/self/io").readline().removeprefix("rchar: "))

split = jax.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), ("data",)), jax.P("data"))

def array(i):  # 256 MB
    part = np.random.default_rng(num * i + jax.process_index()).random((256 // num, 1 << 18), np.float32)
    return jax.make_array_from_process_local_data(split, part)

state = State({str(i): array(i) for i in range(4)})
checkpoints = Checkpoints(sys.argv[1], keep=2, every_steps=1)
for step in (1, 2):
    checkpoints.save(step, state, {"config": {}})
checkpoints.close()
figures = {"sum": sum(read) / 2}
for replicas in (1, 2):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(replicas, num // replicas), ("replica", "data"))
    place = jax.NamedSharding(mesh, jax.P("data"))
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    begin = characters_read()
    arrays.restore(checkpoints.directory / "2", wanted)
    figures[f"restore_{replicas}"] = characters_read() - begin
print(json.dumps(figures))
"""


def shared_cost(directory: pathlib.Path, num: int = 4) -> dict:
    results = run_processes([directory], num, program=("-c", _SAVE), timeout_sec=600)
    assert not any(result.code for result in results), results
    print(results[0].stderr.splitlines()[-1], file=sys.stderr)
    figures = [json.loads(result.stdout.splitlines()[-1]) for result in results]
    return {f"processes_{name}_gb": [round(of[name] / 1e9, 3) for of in figures] for name in figures[0]}


if __name__ == "__main__":
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as scratch:
        figures = save_cost(pathlib.Path(scratch) / "saves", blocks) | checksum_cost(pathlib.Path(scratch) / "sums")
        figures |= shared_cost(pathlib.Path(scratch) / "shared")
    print(json.dumps(figures | {"load": os.getloadavg()[0], "numpy": np.__version__}))
