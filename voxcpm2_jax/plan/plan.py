"""TODO plan.plan."""

import importlib.util
from collections.abc import Sequence

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.plan.compile import NO_LIBTPU
from voxcpm2_jax.plan.entry import assumed, plan_entry
from voxcpm2_jax.plan.search import pareto_front, suggest
from voxcpm2_jax.plan.topology import parse

# ---- plans -----------------------------------------------------------------------------------------------------------


def plan(config: BackboneRun, topologies: Sequence[str], *, search: bool = False) -> dict:
    """Whether and how a run goes on each topology.

    Args:
        config: the run; each of its stages' budgets is planned.   topologies: see the module.
        search: also the Pareto front of rows x remat x mesh x accumulation on each.
    Returns:
        plain data: "ok" (all fit) and one entry of "plans" for each topology and budget; with `search`, "searches".
    Raises:
        UserError: a topology or mesh that cannot be, or TPUs without libtpu.
    """
    cases = [parse(text, config) for text in topologies]
    if any(case.machine.torus for case in cases) and importlib.util.find_spec("libtpu") is None:
        raise UserError(NO_LIBTPU)
    report = {"ok": True, "plans": [], "assumed": assumed()}
    for case in cases:
        entries = [plan_entry(case, batch) for batch in case.batches]
        if not all(entry["fits"] for entry in entries):
            report["ok"] = False
            worst = next(entry for entry in entries if not entry["fits"])
            worst["suggestion"] = suggest(case, worst)
        report["plans"] += entries
    if search:
        report["searches"] = [{"topology": case.machine.name, "front": pareto_front(case)} for case in cases]
    return report
