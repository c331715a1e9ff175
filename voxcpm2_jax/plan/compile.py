"""TODO plan.compile."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from functools import partial

from voxcpm2_jax import sharding
from voxcpm2_jax.config.plain import UserError, from_dict, to_dict
from voxcpm2_jax.config.run import BackboneRun, BatchConfig
from voxcpm2_jax.plan import hlo
from voxcpm2_jax.plan.machine import Collective
from voxcpm2_jax.plan.topology import Case

# Compiling for TPU with none present: quiet, and safe for several processes at once. On a real TPU machine some of these
# would switch the discovery of its neighbours off, so that only the child has them.
CHILD_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
NO_LIBTPU = "libtpu is not installed, which compiles for TPU: pip install 'voxcpm2-jax[tpu]'; GPUs (such as 8xh100) need none"
_COMPILER_OPTIONS = {"exec_time_optimization_effort": -1.0}  # the default may plan a little better


# ---- the child: compiling --------------------------------------------------------------------------------------------


def compile_for(case: Case, batch: BatchConfig) -> dict:
    """Compiles the train step of a case in a child process.

    Returns:
        "fits", "compile_sec", then either "memory" (bytes by kind), "hbm_bytes" if the compiler named it, "collectives" and
        "unknown_loops"; or "needed_bytes", "hbm_bytes" and "message", the compiler's own words.
    Raises:
        UserError: no libtpu, a topology that libtpu does not know, a mesh or batch that cannot be.
    """
    machine = case.machine
    order = {
        "config": to_dict(dataclasses.replace(case.config, mesh=case.mesh, batch=batch, stages=())),
        "topology": f"{machine.chip.name}:{'x'.join(map(str, machine.torus))}",
        "slices": machine.slices,
    }
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | CHILD_ENVIRONMENT
    package = str(pathlib.Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "voxcpm2_jax.plan.compile"],
        input=json.dumps(order),
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = [line for line in done.stderr.splitlines() if line.strip()][-12:]
        raise RuntimeError(f"the compiler for {machine.name} ended with code {done.returncode}:\n" + "\n".join(last))
    result = json.loads(lines[-1])
    if "mistake" in result:
        raise UserError(result["mistake"])
    if "collectives" in result:
        result["collectives"] = [
            Collective(**one | {"spans": one["spans"] and tuple(one["spans"]), "axes": tuple(one["axes"])})
            for one in result["collectives"]
        ]
    return result


def _child() -> None:
    """Compiles what standard input orders; the result is the last line of standard output."""
    order = json.load(sys.stdin)
    try:
        result = _compile(from_dict(BackboneRun, order["config"]), order["topology"], order["slices"])
    except UserError as error:
        result = {"mistake": str(error)}
    print(json.dumps(result))


def _compile(config: BackboneRun, topology: str, slices: int) -> dict:
    import jax
    from jax.experimental import topologies

    from voxcpm2_jax.train import backbone

    try:
        described = topologies.get_topology_desc(topology_name=topology, platform="tpu", num_slices=slices)
    except RuntimeError as error:
        raise UserError(f"{topology}: libtpu cannot be loaded, or does not know this topology ({error})") from None
    mesh = sharding.make_mesh(config.mesh, devices=described.devices)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(partial(backbone.init_state, config))
        layout = sharding.param_shardings(state, mesh)
        batch = _batch_of(config)
        rows = sharding.batch_sharding(mesh)

        program = partial(backbone.train_step, config=config, platform="tpu")
        step = jax.jit(program, donate_argnums=0, out_shardings=(layout, layout.step))
        begin = time.perf_counter()
        placed = sharding.abstract((state, batch), (layout, jax.tree.map(lambda _: rows, batch)))
        lowered = step.lower(*placed)
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
