"""Prints the report of plan.py as tables, and shortens it for the last line of standard output."""

import sys
from collections.abc import Sequence

from voxcpm2_jax.plan.clock import PASSES
from voxcpm2_jax.plan.entry import gib
from voxcpm2_jax.plan.topology import mesh_name


def brief(report: dict) -> dict:
    """The report without the details (passes, collectives, memory by kind)."""
    left_out = ("passes", "collectives", "memory", "estimated_memory")

    def short(entry):
        entry = {name: value for name, value in entry.items() if name not in left_out}
        if "clock" in entry:
            entry["clock"] = {name: value for name, value in entry["clock"].items() if not isinstance(value, list)}
        return entry

    plans = [short(entry) for entry in report["plans"]]
    for entry in plans:
        if entry.get("suggestion"):
            suggestion = entry["suggestion"]
            entry["suggestion"] = suggestion | {"plans": [short(one) for one in suggestion["plans"]]}
    searches = [one | {"front": [short(entry) for entry in one["front"]]} for one in report.get("searches", ())]
    return report | {"plans": plans} | ({"searches": searches} if searches else {})


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
            console.print(f"{entry['topology']}: found nothing that fits; use more chips or larger ones")
    for found in report.get("searches", ()):
        console.print(_summary(found["front"], f"{found['topology']}: the fastest for each amount of memory"))
    is_compiled = any(entry["compiled"] for entry in report["plans"])
    for line in _explanation(report["assumed"], is_compiled=is_compiled):
        console.print(line, markup=False, highlight=False)


def _summary(entries: Sequence[dict], title: str):
    from rich.table import Table

    table = Table(title=title)
    for name in ("topology", "rows x slots", "mesh", "remat", "acc."):
        table.add_column(name)
    for name in ("compile s", "HBM GiB", "of", "PFLOP", "clock s", "MFU", "thumb s", "MFU", "bound s", "MFU", "audio h/day"):
        table.add_column(name, justify="right")
    for e in entries:
        remat = "/".join(filter(None, (e["remat"], e["remat_local"], e["remat_locdit"])))
        remat += f", {e['products']}" if e["products"] else ""
        cells = [e["topology"], f"{e['rows']} x {e['slots']}", mesh_name(e["mesh"]), remat, str(e["accumulate"])]
        cells += [f"{e['compile_sec']:.0f}" if "compile_sec" in e else "-"]
        cells += [gib(e["peak_bytes"]) if e.get("peak_bytes") else "-", gib(e["hbm_bytes"])]
        if "bound" in e:
            cells.append(f"{e['useful_flops'] / 1e15:.3g}")
            figures = [e.get("clock"), e["rule_of_thumb"], e["bound"]]
            for figure in figures:
                cells += [f"{figure['step_sec']:.3g}", f"{figure['mfu']:.1%}"] if figure else ["-", "-"]
            hours = [f"{figure['audio_hours_per_day']:,.0f}" for figure in figures if figure]
            cells.append(f"{hours[0]} .. {hours[-1]}")
        else:
            cells += [""] * 7 + ["does not fit"]
        table.add_row(*cells)
    return table


def _details(entry: dict):
    """Time, traffic and memory of one plan in detail."""
    from rich.console import Group
    from rich.table import Table

    title = f"{entry['topology']}, {entry['rows']} x {entry['slots']}: ms of an update on each device"
    passes = Table(title=title)
    for name in ("part", "pass", "compute", "HBM", "ICI", "DCN", "bound", "thumb", "exposed"):
        passes.add_column(name, justify="left" if name in ("part", "pass") else "right")
    for p in entry["passes"]:
        names = ("compute", "hbm", "ici", "dcn", "bound", "rule_of_thumb", "exposed")
        passes.add_row(p["part"], p["pass"], *(f"{1e3 * p[f'{name}_sec']:.2f}" for name in names))
    passes.add_row("optimiser", "", "", f"{1e3 * entry['optimiser_sec']:.2f}")
    parts = [passes]
    if "clock" in entry:
        parts += _clock(entry["clock"])
    if entry["collectives"]:
        traffic = Table(title="collectives of an update, on each device")
        for name in ("what", "times", "GB whole", "GB over ICI", "GB over DCN"):
            traffic.add_column(name, justify="left" if name == "what" else "right")
        for what, t in sorted(entry["collectives"].items(), key=lambda item: -item[1]["bytes"]):
            traffic.add_row(what, str(t["times"]), *(f"{t[name] / 1e9:.3f}" for name in ("bytes", "ici_bytes", "dcn_bytes")))
        parts.append(traffic)
    memory = entry.get("memory") or entry["estimated_memory"]
    kind = "HBM by the compiler" if "memory" in entry else "HBM, estimated"
    parts.append(f"{kind}, GiB: " + ", ".join(f"{name} {gib(value)}" for name, value in memory.items()))
    if entry.get("unknown_loops"):
        parts.append(f"{entry['unknown_loops']} loops of unknown length: their collectives count once")
    if "positions_needed" in entry:
        needed, present = entry["positions_needed"], entry["positions_present"]
        parts.append(
            f"FSDP: a device needs {needed:,} positions per micro-batch for its gathers to hide behind its products, and has "
            f"{present:,} or more in every stack"
        )
    return Group(*parts)


def _clock(clock: dict) -> list:
    """The compiler's clock: by part and pass, and the dearest lines of code."""
    from rich.table import Table

    times = Table(title="ms of an update by the compiler's clock")
    for name in ("part", *PASSES, "all"):
        times.add_column(name, justify="left" if name == "part" else "right")
    found = {(one["part"], one["pass"]): one["sec"] for one in clock["passes"]}
    for part, sec in clock["parts"].items():
        times.add_row(part, *(f"{1e3 * found.get((part, run), 0.0):.2f}" for run in PASSES), f"{1e3 * sec:.2f}")
    waits = sum(sec for kind, sec in clock["kinds"].items() if kind.startswith("wait"))
    transfers = (
        f"Of them {1e3 * waits:.2f} waiting for transfers; {1e3 * clock['hidden_sec']:.2f} ms of transfers ran beside work."
    )
    if clock["unscheduled"]:
        transfers += f" Kernels without a schedule, which count by their bytes alone: {', '.join(clock['unscheduled'])}."
    return [times, transfers, line_table("the dearest lines of code", clock["lines"])]


def line_table(title: str, lines: Sequence[dict]):
    """A table of `Clock.dearest`."""
    from rich.table import Table

    table = Table(title=title)
    for name in ("ms", "pass", "part", "code", "scope", "what"):
        table.add_column(name, justify="right" if name == "ms" else "left")
    for line in lines:
        names = ("run", "part", "place", "scope", "kind")
        table.add_row(f"{1e3 * line['sec']:.2f}", *(line[name] for name in names))
    return table


def _explanation(assumed: dict, *, is_compiled: bool) -> list[str]:
    slots, patches = assumed["slots_used"], assumed["patches_used"]
    products, links = assumed["products_reach_of_peak"], assumed["links_reach_of_peak"]
    lines = [
        f"Useful FLOPs assume rows {slots:.1%} full and patches {patches:.1%} full (synthetic lengths of speech, rows of 2,680 "
        "patches); padding, recomputation and attention between clips are not useful.",
        "bound: each pass at the vendor's peak FLOPs, memory bandwidth and links, all overlapped; no real run reaches it.",
        f"thumb: a rule of thumb, products at {products:.0%} of the peak, the rest of a stack at a measured share of the "
        f"memory bandwidth, links at {links:.0%}. The shares were measured on one H100 with a plain-JAX sketch of the model, "
        "not with this code; no TPU was measured.",
        "exposed: transfers that take longer than the work that could hide them. Transfers outside of the layers (rest) may "
        "also hide behind LocEnc; the bound counts them as if they could not.",
    ]
    if is_compiled:
        lines.append(
            "clock: the compiler's own estimate of the program that a run would execute, with kernels by their schedule and "
            "transfers by their bytes. plan/README.md compares it with published runs. --fast compiles a worse program, for "
            "its memory and collectives alone."
        )
    return lines
