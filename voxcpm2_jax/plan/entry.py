"""What a run would need and give on machines that are not there: `voxcpm2-jax plan`.

    --topology=[SLICESx]KIND:AxB[xC][,FIELD=VALUE..]    v5e:16x16   4xv6e:8x8   v5p:8x8x8,rows=512,mesh=1x512x1
    --topology=GPUSxKIND[,FIELD=VALUE..]                8xh100   64xh100,rows=256,mesh=8x8x1

For TPU the run's own train step is compiled for the real topology, with no TPU present, in a child process for each: what
its variables and libtpu leave behind stays there. The compiler says what fits, and its program which collectives run how
often. GPUs are predicted without compiling. roofline.py turns both into seconds.

What differs from the run's program: losses are not told by dataset and language, whose names only its shards know, and the
compiler thinks for a third of the time.
"""

from collections.abc import Sequence

from voxcpm2_jax.chips import LINKS_REACHED
from voxcpm2_jax.config.run import BatchConfig
from voxcpm2_jax.plan import roofline
from voxcpm2_jax.plan.compile import compile_for
from voxcpm2_jax.plan.machine import Collective
from voxcpm2_jax.plan.topology import Case, mesh_name, mismatch
from voxcpm2_jax.processes import say

HEADROOM = 0.95  # of the memory, which an estimate must leave free before a suggestion is compiled


def assumed() -> dict:
    return {
        "slots_used": roofline.SLOTS_USED,
        "patches_used": roofline.PATCHES_USED,
        "segment_slots": roofline.SEGMENT_SLOTS,
        "products_reach_of_peak": round(roofline.products_reached(), 3),
        "links_reach_of_peak": LINKS_REACHED,
    }


def plan_entry(case: Case, batch: BatchConfig) -> dict:
    """The plan of one budget of a run on its machine."""
    machine, config, mesh = case.machine, case.config, case.mesh
    entry = {
        "topology": machine.name,
        "chip": machine.chip.name,
        "devices": machine.devices,
        "slices": machine.slices,
        "rows": batch.rows,
        "slots": batch.slots,
        "patches": batch.patches,
        "mesh": list(mesh),
        "remat": config.remat,
        "remat_local": config.remat_local,
        "accumulate": config.accumulate,
        "compiled": False,
        "fits": False,
        "hbm_bytes": machine.hbm_bytes,
    }
    if problem := mismatch(case, batch):
        return entry | {"problem": problem}
    estimate = roofline.memory(config, batch, mesh)
    entry["estimated_memory"] = {name: round(value) for name, value in estimate.items()}
    if machine.torus is None:
        collectives = roofline.layer_collectives(config, batch, machine, mesh)
        needed = sum(estimate.values())
        entry |= {"fits": needed <= HEADROOM * machine.hbm_bytes, "peak_bytes": round(needed)}
        if not entry["fits"]:
            entry["problem"] = f"needs an estimated {gib(needed)} of {gib(machine.hbm_bytes)} GiB"
    else:
        say(f"{machine.name}: compiling {batch.rows} rows of {batch.slots} slots, mesh {mesh_name(mesh)} ...")
        compiled = compile_for(case, batch)
        entry |= {"compiled": compiled["fits"], "fits": compiled["fits"], "compile_sec": compiled["compile_sec"]}
        if not compiled["fits"]:
            needed, there = compiled["needed_bytes"], compiled["hbm_bytes"]
            entry |= {"peak_bytes": needed, "compiler": compiled["message"], "hbm_bytes": there or machine.hbm_bytes}
            told = f"the compiler needs {gib(needed)} of {gib(there)} GiB" if needed and there else compiled["message"]
            say(f"{machine.name}: {told}")
            return entry | {"problem": told}
        collectives = compiled["collectives"]
        entry |= {name: compiled[name] for name in ("memory", "unknown_loops")} | {"peak_bytes": _peak(compiled["memory"])}
    prediction = roofline.predict(config, batch, machine, mesh, collectives)
    entry |= _figures(prediction, collectives)
    if entry["compiled"]:
        mfu = f"at most {entry['bound']['mfu']:.1%} MFU, calibrated {entry['calibrated']['mfu']:.1%}"
        say(f"{machine.name}: compiled in {entry['compile_sec']:.0f} s, {gib(entry['peak_bytes'])} GiB, {mfu}")
    return entry


def _peak(memory: dict) -> int:
    """Bytes that the program takes: what comes in and goes out (donated once), what it makes on the way, its code."""
    return memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] + memory["code"]


def _figures(prediction: roofline.Prediction, collectives: Sequence[Collective]) -> dict:
    def traffic(ours, name_of):
        """Collectives by name: how often an update runs them, and bytes on each device."""
        by_name = {}
        for one in ours:
            ici, dcn = one.wire_bytes()
            old = by_name.setdefault(name_of(one), {"times": 0, "bytes": 0, "ici_bytes": 0, "dcn_bytes": 0})
            old["times"] += one.times
            for name, num_bytes in (("bytes", one.whole_bytes), ("ici_bytes", ici), ("dcn_bytes", dcn)):
                old[name] += round(one.times * num_bytes)
        return by_name

    def result(step_sec):
        return {
            "step_sec": step_sec,
            "mfu": prediction.mfu(step_sec),
            "audio_hours_per_day": prediction.audio_hours_per_day(step_sec),
        }

    return {
        "useful_flops": prediction.useful_flops,
        "executed_flops": prediction.executed_flops,
        "bound": result(prediction.bound_sec),
        "calibrated": result(prediction.calibrated_sec),
        "exposed_sec": prediction.exposed_sec,
        "optimiser_sec": prediction.update_sec,
        "passes": [
            {
                "part": p.part,
                "pass": roofline.PASSES[p.backward],
                "compute_sec": p.compute,
                "hbm_sec": p.hbm,
                "ici_sec": p.ici,
                "dcn_sec": p.dcn,
                "bound_sec": p.bound,
                "calibrated_sec": p.calibrated,
                "exposed_sec": p.exposed,
                "collectives": traffic(
                    [one for one in collectives if (one.part, one.backward) == (p.part, p.backward)], lambda one: one.kind
                ),
            }
            for p in prediction.passes
        ],
        "collectives": traffic(collectives, lambda one: f"{one.kind} over {'+'.join(one.axes) or 'one device'}"),
    }


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"
