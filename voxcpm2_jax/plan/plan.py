"""`voxcpm2-jax plan`: memory, traffic and speed of a training run on machines that are not present.

For each topology (topology.py) the run is planned at each of its batch sizes (entry.py). For TPUs the train step is compiled
(compile.py) and its program read: whether it fits, how often each collective runs (hlo.py), and how long the compiler thinks
it takes (clock.py). For GPUs the first two are estimated. roofline.py turns either into seconds by arithmetic. Where the run
does not fit, search.py looks for a change with which it does. report.py prints the result.

All seconds are predictions, not measurements; README.md in this folder says what they assume.
"""

import importlib.util
from collections.abc import Sequence

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.plan import roofline
from voxcpm2_jax.plan.compile import NO_LIBTPU
from voxcpm2_jax.plan.entry import plan_entry
from voxcpm2_jax.plan.search import pareto_front, suggest
from voxcpm2_jax.plan.topology import parse


def plan(config: BackboneRun, topologies: Sequence[str], *, search: bool = False, fast: bool = False) -> dict:
    """Plans a run on each topology.

    Args:
        config: the run; the batch of each of its stages is planned.   topologies: values of --topology.
        search: also search rows x remat x mesh x accumulation on each machine.
        fast: compile with little effort: memory and collectives, without the compiler's clock.
    Returns:
        plain data: "ok" (everything fits), "plans" with one entry for each topology and batch, "assumed" (the constants
        behind the figures) and, with `search`, "searches".
    Raises:
        UserError: an unknown topology, an impossible mesh, or TPUs without libtpu.
    """
    cases = [parse(text, config) for text in topologies]
    if any(case.machine.torus for case in cases) and importlib.util.find_spec("libtpu") is None:
        raise UserError(NO_LIBTPU)
    report = {"ok": True, "plans": [], "assumed": roofline.assumptions()}
    for case in cases:
        entries = [plan_entry(case, batch, fast=fast) for batch in case.batches]
        if not all(entry["fits"] for entry in entries):
            report["ok"] = False
            worst = next(entry for entry in entries if not entry["fits"])
            worst["suggestion"] = suggest(case, worst)
        report["plans"] += entries
    if search:
        report["searches"] = [{"topology": case.machine.name, "front": pareto_front(case)} for case in cases]
    return report
