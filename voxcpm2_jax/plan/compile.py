"""Compiles a run's train step for TPUs that are not present, with libtpu's compiler (extra "tpu").

Each topology is compiled in a child process, which keeps libtpu's environment variables and global state out of the parent.
The compiled program gives the memory of a device by kind and the collectives with the number of times they run.

`save_for` compiles the run's own program, for `train` to load. The program of `compile_for`, which `plan` reads, is not the one
that the run executes, in two ways:
- It is compiled with optimization_level = O0, which takes about a third of the time. At this effort the compiler
  picks block sizes that make products several times slower (an 8192^3 bfloat16 product on v5e: 79.1 M cycles instead of 9.56 M
  at the default effort), and for some topologies, such as 2x4 chips, other collectives to gather weights. Memory and
  collectives are close to those of the run; nothing about speed is read from this program.
- Losses by dataset and language are left out: only the shards know their names.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

from voxcpm2_jax import sharding
from voxcpm2_jax.config.plain import UserError, from_dict, to_dict
from voxcpm2_jax.config.run import BackboneRun, BatchConfig
from voxcpm2_jax.plan import hlo
from voxcpm2_jax.plan.machine import Collective
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
_COMPILER_OPTIONS = {"optimization_level": 9}  # O0; see the module


# ---- parent ----------------------------------------------------------------------------------------------------------


def compile_for(case: Case, batch: BatchConfig) -> dict:
    """Compiles the train step of a case in a child process.

    Returns:
        "fits" and "compile_sec"; if it fits also "memory" (bytes by kind), "collectives" and "unknown_loops", otherwise
        "needed_bytes", "hbm_bytes" and "message" of the compiler.
    Raises:
        UserError: libtpu is missing or does not know the topology, or the mesh or batch does not suit it.
        RuntimeError: the compiler failed; the last lines of its log are the message.
    """
    result = _in_child(case, {"config": to_dict(dataclasses.replace(case.config, mesh=case.mesh, batch=batch, stages=()))})
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


def _in_child(case: Case, job: dict) -> dict:
    """The result of a job in a process of its own."""
    machine = case.machine
    job |= {"topology": f"{machine.chip.name}:{'x'.join(map(str, machine.torus))}", "slices": machine.slices}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | CHILD_ENVIRONMENT
    package = str(pathlib.Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "voxcpm2_jax.plan.compile"],
        input=json.dumps(job),
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
            result = _compile(config, devices)
    except UserError as error:
        result = {"mistake": str(error)}
    print(json.dumps(result))


def _devices(topology: str, slices: int) -> list:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology_name=topology, platform="tpu", num_slices=slices).devices
    except RuntimeError as error:
        raise UserError(f"{topology}: libtpu cannot be loaded or does not know this topology: {error}") from None


def _compile(config: BackboneRun, devices) -> dict:
    import jax

    from voxcpm2_jax.train import backbone

    mesh = sharding.make_mesh(config.mesh, devices=devices)
    with jax.set_mesh(mesh):
        state, batch = backbone.abstract_state(config, mesh), _batch_of(config)
        batch = sharding.abstract(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
        begin = time.perf_counter()
        lowered = backbone.jit_train_step(config, mesh).lower(state, batch)
        try:
            compiled = lowered.compile(compiler_options=_COMPILER_OPTIONS)
        except jax.errors.JaxRuntimeError as error:
            found = hlo.parse_exhausted(str(error))
            if found is None:
                raise
            return {"fits": False, "compile_sec": round(time.perf_counter() - begin, 1), **found}
    seconds = time.perf_counter() - begin
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
    collectives, unknown_loops = hlo.read_collectives(compiled.as_text(), mesh)
    return {
        "fits": True,
        "compile_sec": round(seconds, 1),
        "memory": state_bytes | kinds,
        "collectives": [dataclasses.asdict(one) for one in collectives],
        "unknown_loops": unknown_loops,
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
