"""The plan of one batch size of a run on one machine: an entry of the report.

`plan_entry` checks that the batch can be split, then gets memory and collectives from the compiler (TPU, compile.py) or by
arithmetic (GPU), and lets roofline.py turn them into seconds. An entry is plain data that goes into the report's JSON.
"""

from collections.abc import Sequence

from voxcpm2_jax.config.run import BatchConfig
from voxcpm2_jax.plan import roofline
from voxcpm2_jax.plan.compile import compile_for
from voxcpm2_jax.plan.machine import Collective
from voxcpm2_jax.plan.topology import Case, mesh_name, mismatch
from voxcpm2_jax.processes import say

HEADROOM = 0.95  # share of a device's memory that an estimate may fill


def plan_entry(case: Case, batch: BatchConfig, *, fast: bool = False) -> dict:
    """Plans one batch size of a case.

    Args:
        fast: compile with little effort, for memory and collectives: the entry gets no "clock".
    Returns:
        the entry: "fits", "peak_bytes", the figures of `roofline.predict` (none if the batch cannot be split or the compiler
        ran out of memory) and, if it does not fit, "problem": why, in one line.
    """
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
        "remat_locdit": config.remat_locdit,
        "locdit_at_once": config.locdit_at_once,
        "clip_slots": batch.clip_slots,
        "products": config.products,
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
        compiled = compile_for(case, batch, fast=fast)
        entry |= {"compiled": compiled["fits"], "fits": compiled["fits"], "compile_sec": compiled["compile_sec"]}
        if not compiled["fits"]:
            needed, available = compiled["needed_bytes"], compiled["hbm_bytes"]
            entry |= {"peak_bytes": needed, "compiler": compiled["message"], "hbm_bytes": available or machine.hbm_bytes}
            is_known = needed and available
            problem = f"the compiler needs {gib(needed)} of {gib(available)} GiB" if is_known else compiled["message"]
            say(f"{machine.name}: {problem}")
            return entry | {"problem": problem}
        collectives = compiled["collectives"]
        entry |= {name: compiled[name] for name in ("memory", "unknown_loops")} | {"peak_bytes": _peak(compiled["memory"])}
        entry["fast"] = fast
    if gathers := roofline.positions_for_gathers(config, batch, machine, mesh):
        entry |= dict(zip(("positions_needed", "positions_present"), map(round, gathers)))
    prediction = roofline.predict(config, batch, machine, mesh, collectives)
    entry |= _figures(prediction, collectives)
    if entry["compiled"]:
        mfu = f"MFU at most {entry['bound']['mfu']:.1%}"
        if not fast:
            step_sec = compiled["clock"]["step_sec"]
            hours = prediction.audio_hours_per_day(step_sec)
            entry["clock"] = compiled["clock"] | {"mfu": prediction.mfu(step_sec), "audio_hours_per_day": hours}
            mfu += f", by the compiler's clock {entry['clock']['mfu']:.1%}"
        kept = " (kept from an earlier plan)" if compiled.get("kept") else ""
        say(f"{machine.name}: compiled in {entry['compile_sec']:.0f} s{kept}, {gib(entry['peak_bytes'])} GiB, {mfu}")
    return entry


def _peak(memory: dict) -> int:
    """The most bytes that the program has in use at once, and its code. Where the compiler does not say, all that it takes:
    arguments, outputs (donated ones only once), temporaries, code."""
    if memory["peak"]:
        return memory["peak"] + memory["code"]
    return memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] + memory["code"]


def _figures(prediction: roofline.Prediction, collectives: Sequence[Collective]) -> dict:
    """The prediction as plain data."""

    def traffic(chosen, name_of):
        """Collectives by name: runs per update, and bytes on each device."""
        by_name = {}
        for one in chosen:
            ici, dcn = one.wire_bytes()
            total = by_name.setdefault(name_of(one), {"times": 0, "bytes": 0, "ici_bytes": 0, "dcn_bytes": 0})
            total["times"] += one.times
            for name, num_bytes in (("bytes", one.whole_bytes), ("ici_bytes", ici), ("dcn_bytes", dcn)):
                total[name] += round(one.times * num_bytes)
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
        "rule_of_thumb": result(prediction.rule_of_thumb_sec),
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
                "rule_of_thumb_sec": p.rule_of_thumb,
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
    """Bytes in GiB, with two decimals."""
    return f"{num_bytes / 2**30:.2f}"
