"""Two processes over loopback: one step with checksums, agreement on damage, resuming with another number of processes."""

import json
import pathlib
import re

import numpy as np

from tests import processes
from voxcpm2_jax import workdir
from voxcpm2_jax.checkpoint import integrity

WORK = """
import dataclasses, sys
from typing import Any
import jax, numpy as np
from voxcpm2_jax import processes
from voxcpm2_jax.checkpoint import manager, steps
from voxcpm2_jax.checkpoint.manager import Checkpoints
from voxcpm2_jax.train.start import Start, begin

@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any

workdir, what = sys.argv[1:]
processes.connect()
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
split, copied = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))

def state(step):
    whole_DF = np.arange(4 * 2048, dtype=np.float32).reshape(4, 2048) * step
    kernel = jax.make_array_from_callback(whole_DF.shape, split, lambda index: whole_DF[index])
    return State(jax.make_array_from_callback((), copied, lambda _: np.int32(step)), {"kernel": kernel})

checkpoints = Checkpoints(workdir, keep=3, every_steps=1)
if what == "save":
    for step in (1, 2):
        checkpoints.save(step, state(step), {"config": {}})
else:
    if jax.process_index() != 0:
        manager.complete_steps = lambda directory: []  # an old view of a disk that the processes share
    begun, meta = begin(checkpoints, state(7), {}, Start())
    want = state(meta["step"])
    for got, expected in zip(begun.params["kernel"].addressable_shards, want.params["kernel"].addressable_shards):
        np.testing.assert_array_equal(got.data, expected.data)
    print(f"began at {meta['step']}")
    checkpoints.save(meta["step"] + 1, state(meta["step"] + 1), {"config": {}})
    words = processes.from_first(["größer", 2] if jax.process_index() == 0 else None)
    assert words == ["größer", 2] and steps.has_steps(workdir)
checkpoints.close()
"""


def work(num, *argv):
    results = processes.run_processes(argv, num, program=("-c", WORK))
    assert [result.code for result in results] == [0] * num, results
    return results


SUM = """
import json
from voxcpm2_jax.checkpoint import integrity
crc32, summed = integrity._crc32, []
integrity._crc32 = lambda path: summed.append((str(path), path.stat().st_size)) or crc32(path)
"""


def test_every_process_sums_what_it_wrote(tmp_path):
    """Process 0 reads no array of the others again, and merges their sums with those of the small files that remain."""
    tell = "print(json.dumps([path for path, size in summed if size > 4096]), flush=True)"
    results = processes.run_processes([tmp_path, "save"], 2, program=("-c", SUM + WORK + tell))
    assert [result.code for result in results] == [0, 0], results
    for i, result in enumerate(results):
        large = [pathlib.Path(path) for path in json.loads(result.stdout.splitlines()[-1])]
        assert len(large) == 2 and {path.parts[-3] for path in large} == {f"ocdbt.process_{i}"}
    step = tmp_path / "checkpoints" / "2"
    recorded = json.loads((step / integrity.CHECKSUMS_FILE).read_text())["files"]
    found = {p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file()}
    assert recorded.keys() == found - set(integrity._UNCOUNTED) and len(recorded) > 10
    integrity.verify(step)
    (line,) = [line for line in results[0].stderr.splitlines() if line.startswith("step 2 is saved: ")]
    assert re.fullmatch(r"step 2 is saved: 2.\d+e-05 GB, final after \d+\.\d s, \d+\.\d s of them for checksums", line)
    assert "is saved" not in results[1].stderr


def test_two_processes_agree_on_damage_and_one_process_resumes(tmp_path):
    work(2, tmp_path, "save")
    newest = tmp_path / "checkpoints" / "2"
    integrity.verify(newest)
    files = [f"params/ocdbt.process_{i}/d" for i in range(2)]
    first, second = (next((newest / name).iterdir()) for name in files)  # each process wrote one
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1
    second.write_bytes(data)
    results = work(2, tmp_path, "begin")
    assert all("began at 1" in result.stdout for result in results)
    altered = f"DAMAGED CHECKPOINT {newest}: {second.relative_to(newest)} was altered"
    named = [result for result in results if altered in result.stderr]
    assert len(named) == 1, "the process that read the file names it"
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir() and first != second
    (alone,) = work(1, tmp_path, "begin")
    assert "began at 2" in alone.stdout and f"starting from step 2 of {tmp_path} (resume)" in alone.stderr
    _, params, step = workdir.load_params(tmp_path)
    np.testing.assert_array_equal(params["kernel"].reshape(-1), np.arange(4 * 2048) * 3)
    assert step == 3
