"""Compiles a run's train step for TPUs that are not present, with libtpu's compiler (extra "tpu").

Each topology is compiled in a child process, which keeps libtpu's environment variables and global state out of the parent.
The compiled program gives the memory of a device by kind, the collectives with the number of times they run, and the
compiler's clock.

The program is the run's, compiled with the effort and options of the run, but for one thing: losses by dataset and language
are left out, since only the shards know their names. plan/clock.py reads its time from it. That takes minutes (2.29 B on
256 chips: about ten on two cores), so that the result is kept and reused while program, libtpu and options stay the same.

`fast` compiles with optimization_level O0, in a tenth of the time. At this effort the compiler picks block sizes that make
products several times slower (an 8192^3 bfloat16 product on v5e: 79.1 M cycles instead of 9.56 M), and for some topologies,
such as 2x4 chips, other collectives to gather weights. Memory and collectives are close to those of the run; nothing about
speed is read from such a program.

`save_for` compiles the run's own program, for `train` to load.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from voxcpm2_jax import files, sharding
from voxcpm2_jax.buckets import cache
from voxcpm2_jax.chips import CHIPS
from voxcpm2_jax.config.plain import UserError, from_dict, to_dict
from voxcpm2_jax.config.run import BackboneRun, BatchConfig
from voxcpm2_jax.flops import STACKS
from voxcpm2_jax.plan import clock, hlo
from voxcpm2_jax.plan.machine import Collective, Machine
from voxcpm2_jax.plan.topology import Case

# Lets libtpu compile with no TPU present, without warnings and in several processes at once. On a real TPU machine some of
# these variables would disable the discovery of other hosts: only the child gets them.
CHILD_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
NO_LIBTPU = "compiling for TPU needs libtpu: pip install 'voxcpm2-jax[tpu]'; GPU topologies (such as 8xh100) do not need it"
_FAST = {"optimization_level": 9}  # O0; see the module
_DEAREST = 10  # lines of code in a report


# ---- parent ----------------------------------------------------------------------------------------------------------


def compile_for(case: Case, batch: BatchConfig, *, fast: bool = False) -> dict:
    """Compiles the train step of a case in a child process, or finds what an earlier call gave.

    Args:
        fast: with little effort, for memory and collectives alone.
    Returns:
        "fits" and "compile_sec"; if it fits also "memory" (bytes by kind), "collectives", "unknown_loops" and, unless fast,
        "clock" (`_clock`); otherwise "needed_bytes", "hbm_bytes" and "message" of the compiler.
    Raises:
        UserError: libtpu is missing or does not know the topology, or the mesh or batch does not suit it.
        RuntimeError: the compiler failed; the last lines of its log are the message.
    """
    run = dataclasses.replace(case.config, mesh=case.mesh, batch=batch, stages=())
    result = _in_child(case, {"config": to_dict(run), "fast": fast})
    if "collectives" in result:
        result["collectives"] = [
            Collective(**one | {"spans": one["spans"] and tuple(one["spans"]), "axes": tuple(one["axes"])})
            for one in result["collectives"]
        ]
    return result


def save_for(case: Case, workdir: str, data: str | None) -> list[dict]:
    """Compiles the train step of every stage as the run would, and saves it in WORKDIR/compiled, where `train` looks for it.

    Returns:
        `pretrain.compile_ahead`'s figures of each program.
    Raises:
        UserError, RuntimeError: as `compile_for`; a program that does not fit the memory is a RuntimeError.
    """
    if case.machine.torus is None:
        raise UserError(f"--compile-for={case.machine.name}: only programs for TPUs can be compiled without the machine")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(NO_LIBTPU)
    return _in_child(case, {"config": to_dict(case.config), "workdir": str(workdir), "data": data})["saved"]


def child_environment(root: pathlib.Path, dumps: str | os.PathLike | None = None) -> dict[str, str]:
    """The environment of a process that compiles for TPU.

    Args:
        root: of the version of this repository that it imports.   dumps: where the schedules of kernels go.
    """
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | CHILD_ENVIRONMENT
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    if dumps is not None:
        arguments = os.environ.get("LIBTPU_INIT_ARGS", ""), clock.DUMP_FLAGS.format(folder=dumps)
        environment["LIBTPU_INIT_ARGS"] = " ".join(filter(None, arguments))
    return environment


def _in_child(case: Case, job: dict) -> dict:
    """The result of a job in a process of its own."""
    machine = case.machine
    job |= {"topology": f"{machine.chip.name}:{'x'.join(map(str, machine.torus))}", "slices": machine.slices}
    job |= {"name": machine.name, "chip": machine.chip.name, "torus": machine.torus, "slice_chips": machine.slice_chips}
    with tempfile.TemporaryDirectory() as folder:
        is_timed = not job.get("fast") and "workdir" not in job
        environment = child_environment(pathlib.Path(__file__).parents[2], folder if is_timed else None)
        done = subprocess.run(
            [sys.executable, "-m", "voxcpm2_jax.plan.compile"],
            input=json.dumps(job | {"dumps": folder}),
            env=environment,
            capture_output=True,
            text=True,
        )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = [line for line in done.stderr.splitlines() if line.strip()][-12:]
        raise RuntimeError(f"compiling for {machine.name} ended with exit code {done.returncode}:\n" + "\n".join(last))
    result = json.loads(lines[-1])
    if "mistake" in result:
        raise UserError(result["mistake"])
    return result


# ---- child -----------------------------------------------------------------------------------------------------------


def _child() -> None:
    """Compiles the job on standard input; the result is the last line of standard output."""
    job = json.load(sys.stdin)
    try:
        config, devices = from_dict(BackboneRun, job["config"]), _devices(job["topology"], job["slices"])
        if "workdir" in job:
            from voxcpm2_jax.train import pretrain

            result = {"saved": pretrain.compile_ahead(config, job["workdir"], job["data"], devices)}
        else:
            result = _compile(config, devices, job)
    except UserError as error:
        result = {"mistake": str(error)}
    print(json.dumps(result))


def _devices(topology: str, slices: int) -> list:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology_name=topology, platform="tpu", num_slices=slices).devices
    except RuntimeError as error:
        raise UserError(f"{topology}: libtpu cannot be loaded or does not know this topology: {error}") from None


def _compile(config: BackboneRun, devices, job: dict) -> dict:
    import jax

    from voxcpm2_jax.train import backbone

    mesh = sharding.make_mesh(config.mesh, devices=devices)
    with jax.set_mesh(mesh):
        state, batch = backbone.abstract_state(config, mesh), _batch_of(config)
        batch = sharding.abstract(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
        lowered = backbone.jit_train_step(config, mesh).lower(state, batch)
    kept = _kept_result(lowered.as_text(), job, mesh)
    if kept.is_file():
        return json.loads(kept.read_text()) | {"kept": True}
    kept.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=_FAST if job["fast"] else None)
    except jax.errors.JaxRuntimeError as error:
        result = hlo.parse_exhausted(str(error))
        if result is None:
            raise
        result = {"fits": False} | result
    else:
        result = {"fits": True} | _read(compiled, state, mesh, job, config.batch)
    result["compile_sec"] = round(time.perf_counter() - begin, 1)
    files.replace_file(kept, json.dumps(result))
    return result


def _kept_result(program: str, job: dict, mesh) -> pathlib.Path:
    """Where the result of compiling a lowered program is kept."""
    import jax
    import libtpu

    arguments = os.environ.get("LIBTPU_INIT_ARGS", "").replace(clock.DUMP_FLAGS.format(folder=job["dumps"]), "")
    versions = jax.__version__, getattr(libtpu, "__version__", ""), arguments
    package = pathlib.Path(__file__).parents[1]  # what reads the program, and the lines of code that it names
    code = [
        path.read_text() for path in sorted([*package.glob("plan/*.py"), *package.glob("models/*.py"), package / "chips.py"])
    ]
    options = CHIPS[job["chip"]].compiler_options
    devices = [(device.id, device.coords) for device in mesh.devices.flat]
    parts = program, job["topology"], job["slices"], job["fast"], options, mesh.shape_tuple, devices, versions, code
    return cache.root() / "plans" / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.json"


def _read(compiled, state, mesh, job: dict, batch: BatchConfig) -> dict:
    """Memory, collectives and clock of a compiled train step."""
    stats = compiled.memory_analysis()
    kinds = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }
    state_bytes = {
        "parameters": sharding.device_bytes(state.params, mesh),
        "optimiser": sharding.device_bytes(state.opt_state, mesh),
    }
    if state.ema is not None:
        state_bytes["average"] = sharding.device_bytes(state.ema, mesh)
    text = compiled.as_text()
    collectives, unknown_loops = hlo.read_collectives(text, mesh)
    result = {
        "memory": state_bytes | kinds,
        "collectives": [dataclasses.asdict(one) for one in collectives],
        "unknown_loops": unknown_loops,
    }
    return result if job["fast"] else result | {"clock": _clock(text, mesh, job, batch)}


def _clock(text: str, mesh, job: dict, batch: BatchConfig) -> dict:
    """The compiler's clock as plain data, in seconds: "step_sec", "hidden_sec" (transfers beside work), "parts", "passes",
    "kinds" and the dearest "lines"."""
    from voxcpm2_jax.models.attention import splash_share

    machine = Machine(job["name"], CHIPS[job["chip"]], job["slices"], tuple(job["torus"]), job["slice_chips"])
    kernels = clock.kernels_in(pathlib.Path(job["dumps"]), {"splash": splash_share(batch.slots, batch.clip_slots)})
    ticks = clock.read(text, machine, mesh, kernels)
    parts = {part: sec for (part,), sec in ticks.seconds_by("part").items()}
    return {
        "step_sec": ticks.seconds,
        "hidden_sec": ticks.hidden_cycles / machine.chip.clock_hz,
        "parts": {part: parts.get(part, 0.0) for part in (*STACKS, "rest")},
        "passes": [{"part": part, "pass": run, "sec": sec} for (part, run), sec in ticks.seconds_by("part", "run").items()],
        "unscheduled": ticks.unscheduled,
        "kinds": {kind: sec for (kind,), sec in ticks.seconds_by("kind").items()},
        "lines": ticks.dearest(_DEAREST),
    }


def _batch_of(config: BackboneRun):
    """Shapes and dtypes of a batch."""
    import jax
    import jax.numpy as jnp

    from voxcpm2_jax.sequence import Batch

    b, P, C = config.batch, config.model.patch_size, config.model.feat_dim
    slots, patches = (b.rows, b.slots), (b.rows, b.patches)
    return Batch(
        tokens_BT=jax.ShapeDtypeStruct(slots, jnp.int32),
        segment_BT=jax.ShapeDtypeStruct(slots, jnp.int32),
        position_BT=jax.ShapeDtypeStruct(slots, jnp.int32),
        patches_BMPC=jax.ShapeDtypeStruct((*patches, P, C), jnp.float32),
        slot_BM=jax.ShapeDtypeStruct(patches, jnp.int32),
        target_BM=jax.ShapeDtypeStruct(patches, bool),
        stop_BM=jax.ShapeDtypeStruct(patches, jnp.int32),
    )


if __name__ == "__main__":
    _child()
