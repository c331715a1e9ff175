"""What a run would need and give on machines that are not there: `voxcpm2-jax plan`.

    --topology=[SLICESx]KIND:AxB[xC][,FIELD=VALUE..]    v5e:16x16   4xv6e:8x8   v5p:8x8x8,rows=512,mesh=1x512x1
    --topology=GPUSxKIND[,FIELD=VALUE..]                8xh100   64xh100,rows=256,mesh=8x8x1

For TPU the run's own train step is compiled for the real topology, with no TPU present, in a child process for each: what
its variables and libtpu leave behind stays there. The compiler says what fits, and its program which collectives run how
often. GPUs are predicted without compiling. roofline.py turns both into seconds.

What differs from the run's program: losses are not told by dataset and language, whose names only its shards know, and the
compiler thinks for a third of the time.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from voxcpm2_jax import hlo, roofline, sharding
from voxcpm2_jax.chips import CHIPS, LINKS_REACHED
from voxcpm2_jax.config import BackboneRun, BatchConfig, UserError, from_dict, to_dict
from voxcpm2_jax.roofline import Collective, Machine

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

_PODS = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TPU_SHAPES = {
    "v5e": _PODS,
    "v6e": _PODS,
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
            "16x16x24"),
}  # fmt: skip
GPUS = tuple(name for name, chip in CHIPS.items() if not chip.pattern.startswith("TPU"))

_HEADROOM = 0.95  # of the memory, which an estimate must leave free before a suggestion is compiled
_MAX_TRIES = 4  # suggestions compiled for one that does not fit
_MAX_FRONT = 6  # points of a search that are compiled


# ---- topologies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run on a machine."""

    machine: Machine
    config: BackboneRun

    @property
    def mesh(self) -> tuple[int, int, int]:
        return sharding.fill(self.config.mesh, self.machine.devices, self.machine.slices if self.machine.torus else 1)

    @property
    def batches(self) -> list[BatchConfig]:
        """Budgets of the run to plan, in the order of its stages: of those alike but for their rows the largest stands for
        all, and each that cannot be split stands for itself."""
        stages = [self.config.batch if stage.batch is None else stage.batch for stage in self.config.stages]
        budgets = list(dict.fromkeys(stages or [self.config.batch]))
        most = {}
        for batch in budgets:
            alike = dataclasses.replace(batch, rows=1)
            most[alike] = max(most.get(alike, 0), batch.rows)
        return [b for b in budgets if b.rows == most[dataclasses.replace(b, rows=1)] or _mismatch(self, b)]


def parse(text: str, config: BackboneRun) -> Case:
    """A case from --topology=TEXT.

    Raises:
        UserError: no such chip, shape or field; the message lists those there are.
    """
    name, *fields = text.split(",")
    if match := re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", name):
        slices, kind, shape = int(match[1] or 1), match[2], match[3]
        if shape not in TPU_SHAPES.get(kind, ()) or slices < 1:
            raise UserError(f"--topology={text}: no such TPU; {_known()}")
        torus = tuple(int(n) for n in shape.split("x"))
        machine = Machine(name, CHIPS[kind], slices, torus, math.prod(torus))
    elif (match := re.fullmatch(r"(\d+)x(.+)", name)) and match[2] in GPUS and int(match[1]) >= 1:
        chip, count = CHIPS[match[2]], int(match[1])
        domain = min(count, chip.domain)
        if count % domain:
            raise UserError(f"--topology={text}: {count} GPUs are no whole number of machines of {domain}")
        machine = Machine(name, chip, count // domain, None, domain)
    else:
        raise UserError(f"--topology={text}: expected {_known()}")
    return Case(machine, _with_fields(text, config, fields))


def _known() -> str:
    tpus = "; ".join(f"{kind}:{', '.join(shapes)}" for kind, shapes in TPU_SHAPES.items())
    return f"TPU slices as [SLICESx]KIND:SHAPE with {tpus}; or GPUs as COUNTxKIND with {', '.join(GPUS)}"


def _with_fields(text, config: BackboneRun, fields: Sequence[str]) -> BackboneRun:
    def count(value):
        if not value.isdecimal():
            raise UserError(f"--topology={text}: expected a whole number, got {value!r}")
        return int(value)

    for field in fields:
        name, _, value = field.partition("=")
        if name == "rows":
            config = with_rows(config, count(value))
        elif name == "accumulate":
            config = dataclasses.replace(config, accumulate=count(value))
        elif name in ("remat", "remat_local"):
            config = dataclasses.replace(config, **{name: value})
        elif name == "mesh" and re.fullmatch(r"(-1|\d+)x(-1|\d+)x\d+", value):
            config = dataclasses.replace(config, mesh=tuple(int(n) for n in value.split("x")))
        else:
            raise UserError(
                f"--topology={text}: {field!r} is none of rows=N, accumulate=N, remat=NAME, remat_local=NAME, "
                "mesh=REPLICAxDATAxTENSOR; other fields are set for all topologies, by --config.NAME=VALUE"
            )
    return config


def with_rows(config: BackboneRun, rows: int) -> BackboneRun:
    """The run with that many rows a batch; stages with budgets of their own keep their ratio to it."""
    if rows < 1:
        raise UserError(f"rows={rows}: expected at least 1")

    def scaled(batch):
        new, rest = divmod(batch.rows * rows, config.batch.rows)
        if rest:
            raise UserError(
                f"rows={rows}: a stage has {batch.rows} rows where the run has {config.batch.rows}: no whole number"
            )
        return dataclasses.replace(batch, rows=new)

    stages = tuple(s if s.batch is None else dataclasses.replace(s, batch=scaled(s.batch)) for s in config.stages)
    return dataclasses.replace(config, batch=scaled(config.batch), stages=stages)


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
    report = {"ok": True, "plans": [], "assumed": _assumed()}
    for case in cases:
        entries = [_entry(case, batch) for batch in case.batches]
        if not all(entry["fits"] for entry in entries):
            report["ok"] = False
            worst = next(entry for entry in entries if not entry["fits"])
            worst["suggestion"] = _suggest(case, worst)
        report["plans"] += entries
    if search:
        report["searches"] = [{"topology": case.machine.name, "front": _search(case)} for case in cases]
    return report


def _assumed() -> dict:
    return {
        "slots_used": roofline.SLOTS_USED,
        "patches_used": roofline.PATCHES_USED,
        "segment_slots": roofline.SEGMENT_SLOTS,
        "products_reach_of_peak": round(roofline.products_reached(), 3),
        "links_reach_of_peak": LINKS_REACHED,
    }


def _entry(case: Case, batch: BatchConfig) -> dict:
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
    if problem := _mismatch(case, batch):
        return entry | {"problem": problem}
    estimate = roofline.memory(config, batch, mesh)
    entry["estimated_memory"] = {name: round(value) for name, value in estimate.items()}
    if machine.torus is None:
        collectives = roofline.layer_collectives(config, batch, machine, mesh)
        needed = sum(estimate.values())
        entry |= {"fits": needed <= _HEADROOM * machine.hbm_bytes, "peak_bytes": round(needed)}
        if not entry["fits"]:
            entry["problem"] = f"needs an estimated {_gib(needed)} of {_gib(machine.hbm_bytes)} GiB"
    else:
        _say(f"{machine.name}: compiling {batch.rows} rows of {batch.slots} slots, mesh {_by(mesh)} ...")
        compiled = compile_for(case, batch)
        entry |= {"compiled": compiled["fits"], "fits": compiled["fits"], "compile_sec": compiled["compile_sec"]}
        if not compiled["fits"]:
            needed, there = compiled["needed_bytes"], compiled["hbm_bytes"]
            entry |= {"peak_bytes": needed, "compiler": compiled["message"], "hbm_bytes": there or machine.hbm_bytes}
            told = f"the compiler needs {_gib(needed)} of {_gib(there)} GiB" if needed and there else compiled["message"]
            _say(f"{machine.name}: {told}")
            return entry | {"problem": told}
        collectives = compiled["collectives"]
        entry |= {name: compiled[name] for name in ("memory", "unknown_loops")} | {"peak_bytes": _peak(compiled["memory"])}
    prediction = roofline.predict(config, batch, machine, mesh, collectives)
    entry |= _figures(prediction, collectives)
    if entry["compiled"]:
        mfu = f"at most {entry['bound']['mfu']:.1%} MFU, calibrated {entry['calibrated']['mfu']:.1%}"
        _say(f"{machine.name}: compiled in {entry['compile_sec']:.0f} s, {_gib(entry['peak_bytes'])} GiB, {mfu}")
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


def _mismatch(case: Case, batch: BatchConfig) -> str | None:
    """Why this batch cannot be split over this mesh, or this mesh not be laid over this machine."""
    machine, mesh = case.machine, case.mesh
    if math.prod(mesh) != machine.devices:
        return f"mesh {_by(mesh)} (replica, data, tensor) has {math.prod(mesh)} devices; {machine.name} has {machine.devices}"
    if machine.torus and mesh[0] % machine.slices:
        return f"mesh {_by(mesh)}: replica must be a multiple of the {machine.slices} slices, nothing else may cross them"
    pieces = roofline.row_shards(mesh) * case.config.accumulate
    if batch.rows % pieces:
        return f"{batch.rows} rows of {batch.slots} slots cannot be split into {pieces} parts (replica x data x accumulate)"
    return None


# ---- suggestions and search ------------------------------------------------------------------------------------------


def variants(case: Case) -> list[Case]:
    """Other ways to run the same on the same machine: rows x remat x mesh x accumulation, those that come out even."""
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
    remats = list(itertools.product(roofline.REMATS, repeat=2))
    parts_tried = [2**i for i in range(7)]
    for rows, (remat, local), mesh, parts in itertools.product(sorted(rows_tried - {0}), remats, meshes, parts_tried):
        try:
            run = dataclasses.replace(with_rows(config, rows), remat=remat, remat_local=local, mesh=mesh, accumulate=parts)
        except UserError:  # a stage's rows do not come out
            continue
        variant = Case(machine, run)
        if not any(_mismatch(variant, batch) for batch in variant.batches):
            found.append(variant)
    return found


def _needs(case: Case) -> float:
    return max(sum(roofline.memory(case.config, batch, case.mesh).values()) for batch in case.batches)


def _speed(case: Case) -> float:
    """Audio hours a day, calibrated, of the run's own budgets."""
    batch = case.config.batch
    collectives = roofline.layer_collectives(case.config, batch, case.machine, case.mesh)
    prediction = roofline.predict(case.config, batch, case.machine, case.mesh, collectives)
    return prediction.audio_hours_per_day(prediction.calibrated_sec)


def _suggest(case: Case, failed: dict) -> dict | None:
    """The variant nearest to the run's batch, then fastest, that does fit, its entries beside it; None if none was found."""
    estimate = sum(failed.get("estimated_memory", {}).values())
    # How much more the compiler needs than the estimate says.
    factor = failed["peak_bytes"] / estimate if estimate and failed.get("peak_bytes") else 1.0
    there = _HEADROOM * case.machine.hbm_bytes
    left = [(variant, _needs(variant)) for variant in variants(case)]
    for _ in range(_MAX_TRIES):
        left = [(variant, needs) for variant, needs in left if factor * needs <= there]
        if not left:
            return None
        nearest = min(_distance(variant, case) for variant, _ in left)
        variant = max((v for v, _ in left if _distance(v, case) == nearest), key=_speed)
        left = [(v, needs) for v, needs in left if v is not variant]
        entries = []
        for batch in sorted(variant.batches, key=lambda b: -sum(roofline.memory(variant.config, b, variant.mesh).values())):
            entries.append(_entry(variant, batch))
            if not entries[-1]["fits"]:
                break
        else:
            ratio = variant.config.batch.rows / case.config.batch.rows
            return {"topology": _in_words(variant, case), "rows_ratio": ratio, "plans": entries}
        needed = entries[-1].get("peak_bytes")
        estimate = sum(entries[-1]["estimated_memory"].values())
        factor = max(factor, needed / estimate if needed else 1.1 * factor)
    return None


def _distance(variant: Case, case: Case) -> float:
    """How far a variant's batch is from the run's, in doublings."""
    return abs(math.log2(variant.config.batch.rows / case.config.batch.rows))


def _in_words(variant: Case, case: Case) -> str:
    """The --topology of a variant: what differs from the run."""
    new, old = variant.config, case.config
    fields = {
        "rows": (new.batch.rows, old.batch.rows),
        "remat": (new.remat, old.remat),
        "remat_local": (new.remat_local or new.remat, old.remat_local or new.remat),  # None: as `remat` then says
        "mesh": (_by(variant.mesh), _by(case.mesh)),
        "accumulate": (new.accumulate, old.accumulate),
    }
    return ",".join([case.machine.name, *(f"{name}={ours}" for name, (ours, theirs) in fields.items() if ours != theirs)])


def _search(case: Case) -> list[dict]:
    """The Pareto front of speed and free memory by the estimate; up to _MAX_FRONT points of it, compiled where it is a TPU."""
    there = _HEADROOM * case.machine.hbm_bytes
    needs = [(variant, _needs(variant)) for variant in variants(case)]
    points = [(variant, _speed(variant), num_bytes) for variant, num_bytes in needs if num_bytes <= there]
    points = sorted(points, key=lambda point: (-point[1], point[2]))
    front, least = [], math.inf
    for point in points:
        if point[2] < least:
            front.append(point)
            least = point[2]
    step = max(1, math.ceil(len(front) / _MAX_FRONT))
    found = []
    for variant, _, _ in front[::step]:
        batch = variant.config.batch
        found.append(_entry(variant, batch) | {"as": _in_words(variant, case)})
    return found


def brief(report: dict) -> dict:
    """The report without passes, collectives and kinds of memory: one line of JSON."""
    left_out = ("passes", "collectives", "memory", "estimated_memory")

    def short(entry):
        return {name: value for name, value in entry.items() if name not in left_out}

    plans = [short(entry) for entry in report["plans"]]
    for entry in plans:
        if entry.get("suggestion"):
            suggestion = entry["suggestion"]
            entry["suggestion"] = suggestion | {"plans": [short(one) for one in suggestion["plans"]]}
    searches = [one | {"front": [short(entry) for entry in one["front"]]} for one in report.get("searches", ())]
    return report | {"plans": plans} | ({"searches": searches} if searches else {})


# ---- for people ------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _by(mesh: Sequence[int]) -> str:
    return "x".join(map(str, mesh))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f}"


def show(report: dict) -> None:
    """Prints the report as tables on standard error."""
    from rich.console import Console

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 180)
    console.print(_summary(report["plans"], "plan"))
    for entry in report["plans"]:
        if "bound" in entry:
            console.print(_details(entry))
        if "problem" in entry:
            console.print(f"{entry['topology']}: does not fit: {entry['problem']}", markup=False, highlight=False)
        if suggestion := entry.get("suggestion"):
            ratio = suggestion["rows_ratio"]
            what = "this fits" if ratio == 1 else f"this fits, with {ratio:.3g} times the rows in every batch"
            console.print(_summary(suggestion["plans"], f"{what}: --topology={suggestion['topology']}"))
        elif "suggestion" in entry:
            console.print(f"{entry['topology']}: nothing was found that fits; it takes more chips, or larger ones")
    for found in report.get("searches", ()):
        console.print(_summary(found["front"], f"{found['topology']}: fastest for the memory it leaves free"))
    for line in _explanation(report["assumed"]):
        console.print(line, markup=False, highlight=False)


def _summary(entries: Sequence[dict], title: str):
    from rich.table import Table

    table = Table(title=title)
    for name in ("topology", "rows x slots", "mesh", "remat", "acc."):
        table.add_column(name)
    for name in ("compile s", "HBM GiB", "of", "PFLOP", "bound s", "MFU", "calibr. s", "MFU", "exposed", "audio h/day"):
        table.add_column(name, justify="right")
    for e in entries:
        remat = "/".join(filter(None, (e["remat"], e["remat_local"])))
        cells = [e["topology"], f"{e['rows']} x {e['slots']}", _by(e["mesh"]), remat, str(e["accumulate"])]
        cells += [f"{e['compile_sec']:.0f}" if "compile_sec" in e else "-"]
        cells += [_gib(e["peak_bytes"]) if e.get("peak_bytes") else "-", _gib(e["hbm_bytes"])]
        if "bound" in e:
            bound, calibrated = e["bound"], e["calibrated"]
            cells += [
                f"{e['useful_flops'] / 1e15:.3g}",
                f"{bound['step_sec']:.3g}",
                f"{bound['mfu']:.1%}",
                f"{calibrated['step_sec']:.3g}",
                f"{calibrated['mfu']:.1%}",
                "no" if not e["exposed_sec"] else f"{e['exposed_sec'] * 1e3:.3g} ms",
                f"{calibrated['audio_hours_per_day']:,.0f} .. {bound['audio_hours_per_day']:,.0f}",
            ]
        else:
            cells += [""] * 6 + ["does not fit"]
        table.add_row(*cells)
    return table


def _details(entry: dict):
    """Where the time, the memory and the bytes of one plan go."""
    from rich.console import Group
    from rich.table import Table

    title = f"{entry['topology']}, {entry['rows']} x {entry['slots']}: ms of an update on each device"
    passes = Table(title=title)
    for name in ("part", "pass", "compute", "HBM", "ICI", "DCN", "bound", "calibrated", "exposed"):
        passes.add_column(name, justify="left" if name in ("part", "pass") else "right")
    for p in entry["passes"]:
        names = ("compute", "hbm", "ici", "dcn", "bound", "calibrated", "exposed")
        passes.add_row(p["part"], p["pass"], *(f"{1e3 * p[f'{name}_sec']:.2f}" for name in names))
    passes.add_row("optimiser", "", "", f"{1e3 * entry['optimiser_sec']:.2f}")
    parts = [passes]
    if entry["collectives"]:
        traffic = Table(title="collectives of an update, on each device")
        for name in ("what", "times", "GB whole", "GB over ICI", "GB over DCN"):
            traffic.add_column(name, justify="left" if name == "what" else "right")
        for what, t in sorted(entry["collectives"].items(), key=lambda item: -item[1]["bytes"]):
            traffic.add_row(what, str(t["times"]), *(f"{t[name] / 1e9:.3f}" for name in ("bytes", "ici_bytes", "dcn_bytes")))
        parts.append(traffic)
    memory = entry.get("memory") or entry["estimated_memory"]
    kind = "HBM by the compiler" if "memory" in entry else "HBM, estimated"
    parts.append(f"{kind}, GiB: " + ", ".join(f"{name} {_gib(value)}" for name, value in memory.items()))
    if entry.get("unknown_loops"):
        parts.append(f"{entry['unknown_loops']} loops of unknown length: their collectives count once")
    return Group(*parts)


def _explanation(assumed: dict) -> list[str]:
    a = assumed
    return [
        f"Useful FLOPs: rows {a['slots_used']:.1%} full, their patches {a['patches_used']:.1%} (measured on log-normal speech "
        "in 15 languages); padding, recomputation and attention between clips are not useful.",
        "bound: every pass at the chip's peak, memory and links at theirs, all at once; nobody reaches it. calibrated: "
        f"products at {a['products_reach_of_peak']:.0%} of the peak, what surrounds them at the share of the memory's "
        f"bandwidth that one H100 reached with this model, links at {a['links_reach_of_peak']:.0%}; no TPU was measured.",
        "exposed: transfers that take longer than the work of the layers they could hide behind; those outside of the layers "
        "(rest) may run beside LocEnc, which has nothing to do with them. The bound pays for them as if they ran alone.",
    ]


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
    package = str(pathlib.Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "voxcpm2_jax.plan"],
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
