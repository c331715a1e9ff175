"""`voxcpm2-jax bench clock`: what one stack costs on a TPU by the compiler's clock, with no TPU, before and after a change.

Forward and backward of the stack are compiled for one chip (parts.py, in a process of its own) and read by plan/clock.py. With
`against`, another version of this repository, checked out into a temporary folder, is compiled beside it. This is the loop in
which the model is made faster: two to four minutes a try.
"""

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

from voxcpm2_jax import flops
from voxcpm2_jax.chips import CHIPS, check_products
from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import BackboneRun, BatchConfig
from voxcpm2_jax.models.attention import splash_share
from voxcpm2_jax.plan.clock import PASSES, Clock, kernels_in, read
from voxcpm2_jax.plan.compile import child_environment
from voxcpm2_jax.plan.machine import Machine
from voxcpm2_jax.plan.report import line_table
from voxcpm2_jax.processes import say

_ROOT = pathlib.Path(__file__).parents[2]
_DEAREST = 12  # lines of code in a report
_TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # the smallest with such chips


def clock(
    config: BackboneRun,
    *,
    part: str,
    chip: str,
    rows: int = 1,
    against: str | None = None,
    options: Mapping[str, str] | None = None,
) -> dict:
    """Compiles a stack for one chip and reads its clock.

    Args:
        config: whose stack; the other version has to know its fields.   rows: of the batch, on the chip.
        against: a git commit of this repository to compile as well.
        options: of the compiler; None: those of a run (`Chip.compiler_options`).
    Returns:
        plain data: "part", "chip", "rows", "options", "useful_flops" and "versions", each with "name", "sec", "mfu",
        "stack_sec" (without casts of all weights and the like), "temporary_bytes", "compile_sec", "passes" (seconds by pass),
        "lines" (the dearest first) and "unscheduled" (kernels that count by their bytes alone).
    Raises:
        UserError: `against` is no commit, this is no git repository, or the chip does not suit the run's products.
        RuntimeError: the compiler failed; the message has its last lines.
    """
    check_products(config.products, CHIPS[chip])
    machine = Machine(f"{chip}, one chip", CHIPS[chip], 1, (1, 1), 1)
    batch = dataclasses.replace(config.batch, rows=rows)
    run = dataclasses.replace(config, stages=(), batch=batch)
    job = {"config": to_dict(run), "part": part, "topology": _TOPOLOGIES[chip]}
    job["options"] = dict(CHIPS[chip].compiler_options if options is None else options)
    sizes = {"slots": rows * batch.slots, "patches": rows * batch.patches}
    sizes |= {"targets": rows * (batch.target_patches or batch.patches), "squares": rows * batch.slots**2}
    useful = 3.0 * flops.forward_flops(config.model, **sizes)[part]
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        versions = {"this": _ROOT} | ({against: stack.enter_context(_checked_out(against))} if against else {})
        say(f"compiling {part}, {rows} rows, for one {chip}: {', '.join(versions)}; a few minutes")
        children = {name: _start(root, job, folder / str(i)) for i, (name, root) in enumerate(versions.items())}
        for child in children.values():
            stack.callback(child.kill)  # if another one fails
        found = []
        for i, (name, child) in enumerate(children.items()):
            figures, ticks = _finish(child, folder / str(i), machine, batch)
            passes = {run: ticks.seconds_by("run").get((run,), 0.0) for run in PASSES}
            seconds = {
                "sec": ticks.seconds,
                "stack_sec": ticks.seconds_by("part").get((part,), 0.0),
                "mfu": useful / machine.flops / ticks.seconds,
                "passes": passes,
                "lines": ticks.dearest(_DEAREST),
                "unscheduled": ticks.unscheduled,
            }
            found.append({"name": name} | seconds | figures)
    return {"part": part, "chip": chip, "rows": rows, "options": job["options"], "useful_flops": useful, "versions": found}


def show(result: dict) -> None:
    """Prints the clocks side by side on standard error."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 150)
    table = Table(title=f"{result['part']}, {result['rows']} rows, one {result['chip']}: ms by the compiler's clock")
    for name in ("version", *PASSES, "all", "MFU", "temporaries MiB"):
        table.add_column(name, justify="left" if name == "version" else "right")
    for one in result["versions"]:
        cells = [f"{1e3 * one['passes'][run]:.1f}" for run in PASSES] + [f"{1e3 * one['sec']:.1f}", f"{one['mfu']:.1%}"]
        table.add_row(one["name"], *cells, f"{one['temporary_bytes'] / 2**20:,.0f}")
    console.print(table)
    for one in result["versions"]:
        console.print(line_table(f"{one['name']}: the dearest lines", one["lines"]))
        if one["unscheduled"]:
            console.print(f"kernels without a schedule, which count by their bytes alone: {', '.join(one['unscheduled'])}")


# ---- versions --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _checked_out(commit: str) -> Iterator[pathlib.Path]:
    """A temporary folder with another version of this repository."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder) / "version"
        command = ["git", "-C", str(_ROOT), "worktree", "add", "--detach", str(root), commit]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"--against={commit}: git says: {done.stderr.strip().splitlines()[-1]}")
        try:
            yield root
        finally:
            subprocess.run(["git", "-C", str(_ROOT), "worktree", "remove", "--force", str(root)], capture_output=True)


def _start(root: pathlib.Path, job: dict, folder: pathlib.Path) -> subprocess.Popen:
    (folder / "dumps").mkdir(parents=True)
    environment = child_environment(root, folder / "dumps")
    script = pathlib.Path(__file__).with_name("parts.py")
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=environment, cwd=root,
        )  # fmt: skip
    child.stdin.write(json.dumps(job | {"program": str(folder / "program")}))
    child.stdin.close()
    return child


def _finish(child: subprocess.Popen, folder: pathlib.Path, machine: Machine, batch: BatchConfig) -> tuple[dict, Clock]:
    out = child.stdout.read()
    if child.wait():
        last = [line for line in (folder / "log").read_text().splitlines() if line.strip()][-6:]
        raise RuntimeError("compiling failed:\n" + "\n".join(last))
    kernels = kernels_in(folder / "dumps", {"splash": splash_share(batch.slots, batch.clip_slots)})
    ticks = read((folder / "program").read_text(), machine, kernels=kernels)
    return json.loads(out.splitlines()[-1]), ticks
