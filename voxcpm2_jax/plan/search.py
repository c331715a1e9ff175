"""Other ways to run the same training on the same machine: a suggestion where a run does not fit, and `plan --search`.

Both vary rows, remat, mesh and accumulation, estimate memory and speed of all variants by arithmetic, and plan (for TPU:
compile, fast) only the few best.
"""

import dataclasses
import itertools
import math

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import REMAT_POLICIES
from voxcpm2_jax.plan import roofline
from voxcpm2_jax.plan.entry import HEADROOM, plan_entry
from voxcpm2_jax.plan.topology import Case, mesh_name, mismatch, with_rows

_MAX_TRIES = 4  # suggestions to plan for a case that does not fit
_MAX_FRONT = 6  # points of the Pareto front to plan, at most


def variants(case: Case) -> list[Case]:
    """All combinations of rows, remat, mesh and accumulation that divide evenly."""
    machine, config = case.machine, case.config
    heads = config.model.lm_config.num_key_value_heads
    meshes = []
    for tensor in (n for n in (1, 2) if heads % n == 0 and machine.devices % n == 0):
        left = machine.devices // tensor
        slices = machine.slices if machine.torus else 1
        meshes += [(r, left // r, tensor) for r in (slices * 2**i for i in range(12)) if left % r == 0]
    widths = (config.model.tslm.width, config.model.locenc.width, config.model.locdit.width)
    meshes = [mesh for mesh in meshes if all(width % mesh[1] == 0 for width in widths)]
    found = []
    rows_tried = {config.batch.rows * 2**i // 8 for i in range(7)} | {machine.devices * 2**i for i in range(4)}
    remats = list(itertools.product(REMAT_POLICIES, repeat=2))
    parts_tried = [2**i for i in range(7)]
    for rows, (remat, local), mesh, parts in itertools.product(sorted(rows_tried - {0}), remats, meshes, parts_tried):
        try:
            run = dataclasses.replace(with_rows(config, rows), remat=remat, remat_local=local, mesh=mesh, accumulate=parts)
        except UserError:  # a stage would have a fraction of a row
            continue
        variant = Case(machine, run)
        if not any(mismatch(variant, batch) for batch in variant.batches):
            found.append(variant)
    return found


def _estimated_bytes(case: Case) -> float:
    """Memory of a device for the largest batch of the run."""
    return max(sum(roofline.memory(case.config, batch, case.mesh).values()) for batch in case.batches)


def _speed(case: Case) -> float:
    """Hours of audio per day for the run's own batch, by the rule of thumb."""
    batch = case.config.batch
    collectives = roofline.layer_collectives(case.config, batch, case.machine, case.mesh)
    prediction = roofline.predict(case.config, batch, case.machine, case.mesh, collectives)
    return prediction.audio_hours_per_day(prediction.rule_of_thumb_sec)


def suggest(case: Case, failed: dict) -> dict | None:
    """The fastest variant that fits among those with the number of rows nearest to the run's.

    Args:
        failed: the entry that does not fit.
    Returns:
        "topology" (the argument to pass), "rows_ratio" (its rows / the run's) and "plans", its entries; None if none was found.
    """
    estimate = sum(failed.get("estimated_memory", {}).values())
    # By what factor the compiler's need exceeds the estimate.
    factor = failed["peak_bytes"] / estimate if estimate and failed.get("peak_bytes") else 1.0
    available = HEADROOM * case.machine.hbm_bytes
    left = [(variant, _estimated_bytes(variant)) for variant in variants(case)]
    for _ in range(_MAX_TRIES):
        left = [(variant, num_bytes) for variant, num_bytes in left if factor * num_bytes <= available]
        if not left:
            return None
        nearest = min(_distance(variant, case) for variant, _ in left)
        variant = max((v for v, _ in left if _distance(v, case) == nearest), key=_speed)
        left = [(v, num_bytes) for v, num_bytes in left if v is not variant]
        entries = []
        for batch in sorted(variant.batches, key=lambda b: -sum(roofline.memory(variant.config, b, variant.mesh).values())):
            entries.append(plan_entry(variant, batch, fast=True))
            if not entries[-1]["fits"]:
                break
        else:
            ratio = variant.config.batch.rows / case.config.batch.rows
            return {"topology": _topology_argument(variant, case), "rows_ratio": ratio, "plans": entries}
        needed = entries[-1].get("peak_bytes")
        estimate = sum(entries[-1]["estimated_memory"].values())
        factor = max(factor, needed / estimate if needed else 1.1 * factor)
    return None


def _distance(variant: Case, case: Case) -> float:
    """Difference in rows between a variant and the run, in doublings."""
    return abs(math.log2(variant.config.batch.rows / case.config.batch.rows))


def _topology_argument(variant: Case, case: Case) -> str:
    """The value of --topology for a variant: the machine, and what differs from the run."""
    new, old = variant.config, case.config
    fields = {
        "rows": (new.batch.rows, old.batch.rows),
        "remat": (new.remat, old.remat),
        "remat_local": (new.remat_local or new.remat, old.remat_local or new.remat),  # None: as remat
        "mesh": (mesh_name(variant.mesh), mesh_name(case.mesh)),
        "accumulate": (new.accumulate, old.accumulate),
    }
    return ",".join([case.machine.name, *(f"{name}={ours}" for name, (ours, theirs) in fields.items() if ours != theirs)])


def pareto_front(case: Case) -> list[dict]:
    """Plans of variants for which no other is both faster and smaller, by the estimates; at most _MAX_FRONT of them."""
    available = HEADROOM * case.machine.hbm_bytes
    sized = [(variant, _estimated_bytes(variant)) for variant in variants(case)]
    points = [(variant, _speed(variant), num_bytes) for variant, num_bytes in sized if num_bytes <= available]
    points = sorted(points, key=lambda point: (-point[1], point[2]))
    front, least_bytes = [], math.inf
    for point in points:
        if point[2] < least_bytes:
            front.append(point)
            least_bytes = point[2]
    step = max(1, math.ceil(len(front) / _MAX_FRONT))
    found = []
    for variant, _, _ in front[::step]:
        batch = variant.config.batch
        found.append(plan_entry(variant, batch, fast=True) | {"as": _topology_argument(variant, case)})
    return found
