"""`voxcpm2-jax bench train`: checks that this machine computes the train step correctly, then times it.

    check       loss and gradients of the devices' program against float32 on the CPU, for a small batch; with
                --against-reference also the losses of the PyTorch package, for the same clips and random draws
    ours        whole updates on one batch in memory, for each number of rows and each remat policy
    parts       forward and backward of each part of the model by itself, and the optimiser, for the first number of rows
                and the first policy
    reference   the PyTorch package `voxcpm`, trained on the same clips in padded batches

Nothing is timed if the check fails. Each job runs in a child process of its own (train_jobs.py), one after the other, so
that memory figures are separate and running out of memory ends one job only. On a CPU, whose load may change, updates of ours
and of the PyTorch package alternate. This process never touches JAX's devices: they belong to the child.

Needs jax, flax and optax. The data are noise with the lengths of speech, made in memory.
"""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from voxcpm2_jax.config.plain import UserError, to_dict
from voxcpm2_jax.config.run import BackboneRun
from voxcpm2_jax.processes import say


class Disagreement(RuntimeError):  # noqa: N818
    """The check failed; the message is one line for the user."""


def train(
    config: BackboneRun,
    *,
    rows: Sequence[int] = (),
    remats: Sequence[str] = (),
    num_rounds: int = 10,
    parts: bool = False,
    against_reference: bool = False,
    reference_rows: int = 8,
) -> dict:
    """Checks and times training on this machine.

    Args:
        config: model, batch, optimiser and mesh; stages are ignored.   rows, remats: values to compare; none: the config's.
        num_rounds: updates to time; of the PyTorch package, passes over all clips.   parts: also time each part by itself.
        against_reference: also check against and time the PyTorch package.   reference_rows: clips in its batch.
    Returns:
        plain data: the device, "check" (relative errors), "variants" (figures of ours) and, if asked for, "reference" and
        "parts".
    Raises:
        UserError: an impossible config, or the PyTorch package is not installed.
        Disagreement: the check failed; nothing was timed.
    """
    if num_rounds < 1 or reference_rows < 1:
        raise UserError(f"expected at least one round and one row, got {num_rounds} and {reference_rows}")
    variants = [
        dataclasses.replace(config, remat=remat, stages=(), batch=dataclasses.replace(config.batch, rows=n))
        for n in rows or (config.batch.rows,)
        for remat in remats or (config.remat,)
    ]
    say("checking loss and gradients against the CPU" + (", losses against the PyTorch package" if against_reference else ""))
    with _Job("check", variants[0], against_reference=against_reference) as job:
        check = job.first_answer
    say(f"{check['device']} x {check['devices']}, jax {check['jax']}; {_describe_check(check)}")
    if check["failed"]:
        raise Disagreement(f"{'; '.join(check['failed'])}: nothing was timed")

    result = {name: check[name] for name in ("device", "devices", "platform", "jax", "cpu_cores")} | {"check": check["errors"]}
    result["variants"] = []
    with contextlib.ExitStack() as stack:
        start_reference = partial(_Job, "reference", variants[0], rows=reference_rows)
        alternates = against_reference and check["platform"] == "cpu"
        reference = stack.enter_context(start_reference()) if alternates else None
        for variant in variants:
            say(f"timing rows {variant.batch.rows}, remat {variant.remat}")
            result["variants"].append(_measure(variant, num_rounds, reference if variant is variants[0] else None))
            say(_describe_variant(result["variants"][-1]))
        if against_reference:
            say("timing the PyTorch package")
            reference = reference or stack.enter_context(start_reference())
            for _ in range(0 if alternates else num_rounds):
                reference.round()
            result["reference"] = reference.figures()
            _add_ratios(result)
    if parts:
        say("timing parts")
        with _Job("parts", variants[0], rounds=num_rounds) as job:
            result["parts"] = job.first_answer["parts"]
    return result


def _measure(variant: BackboneRun, num_rounds: int, reference: "_Job | None") -> dict:
    """Figures of a variant; rounds of the PyTorch package, if it is timed, alternate with its updates."""
    with _Job("ours", variant) as job:
        for _ in range(num_rounds):
            if "error" in job.first_answer:
                break
            job.round()
            if reference is not None:
                reference.round()
        return job.figures()


def _add_ratios(result: dict) -> None:
    """Adds our speed / the PyTorch package's to the figures of each variant."""
    ours, theirs = result["variants"], result["reference"]
    if "error" in theirs:
        return
    for figures in ours:
        if "error" not in figures:
            figures["ratio"] = figures["audio_sec_per_sec"] / theirs["audio_sec_per_sec"]
    if result["platform"] == "cpu" and "error" not in ours[0]:
        # Rounds that alternated saw the same load of the machine: the median of their ratios.
        scale = (ours[0]["audio_sec"] / theirs["audio_sec"]) if theirs["audio_sec"] else 1.0
        ours[0]["ratio"] = statistics.median(scale * b / a for a, b in zip(ours[0]["rounds_sec"], theirs["rounds_sec"]))


# ---- processes -------------------------------------------------------------------------------------------------------


class _Job:
    """A child process with one of the jobs of train_jobs.py; a context manager.

    Attributes:
        first_answer: what it reports before the first round.
    """

    def __init__(self, name: str, config: BackboneRun, **options):
        self._rounds: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "voxcpm2_jax.bench.train_jobs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._end)
            self._last_answer = self.first_answer = self._ask({"job": name, "config": to_dict(config)} | options)
            on_failure.pop_all()

    def _ask(self, question) -> dict:
        with contextlib.suppress(BrokenPipeError):  # a dead child has printed why on standard error
            print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a measuring process ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        return answer

    def round(self) -> None:
        """Has the child do one timed round, unless it has run out of memory."""
        if "error" not in self._last_answer:
            self._last_answer = self._ask("round")
            self._rounds += [self._last_answer["sec"]] if "sec" in self._last_answer else []

    def figures(self) -> dict:
        """The child's answers, and statistics of its rounds."""
        figures = self.first_answer | self._last_answer
        figures.pop("sec", None)
        if "error" in figures or not self._rounds:
            return figures
        step_sec = statistics.median(self._rounds)
        figures |= {"step_sec": step_sec, "step_sec_least": min(self._rounds), "step_sec_most": max(self._rounds)}
        figures["rounds_sec"] = self._rounds
        figures["audio_sec_per_sec"] = figures["audio_sec"] / step_sec
        if figures.get("flops"):
            peak = figures.pop("peak_flops")
            figures["mfu"] = None if peak is None else figures["flops"] / step_sec / peak
        return figures

    def __enter__(self):
        return self

    def _end(self) -> int:
        """Closes the child's input and waits for its end -> exit code."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        return self._process.wait()

    def __exit__(self, *_):
        if self._end() < 0:
            raise RuntimeError(f"a measuring process was killed by signal {-self._process.returncode}")


# ---- output ----------------------------------------------------------------------------------------------------------


def _describe_check(check: dict) -> str:
    return "relative errors, against float32 on the CPU: " + ", ".join(
        f"{name} {value:.1e}" for name, value in check["errors"].items()
    )


def _describe_variant(v: dict) -> str:
    name = f"rows {v.get('rows', '?')}, remat {v.get('remat', '?')}"
    return f"{name}: {v['error']}" if "error" in v else f"{name}: {v['audio_sec_per_sec']:,.1f} s of audio per second"


def show(result: dict) -> None:
    """Prints tables on standard error."""
    from rich.console import Console
    from rich.table import Table

    def number(value, form):
        return "" if value is None else format(value, form)

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 128)
    table = Table("", "rows", "remat", "audio s/s", "x reference", "MFU", "step s (least .. most)", "memory GB", "compile s")
    lines = [("ours", v) for v in result["variants"]]
    lines += [("reference", result["reference"])] if "reference" in result else []
    for name, v in lines:
        if "error" in v:
            table.add_row(name, str(v.get("rows", "")), v.get("remat", ""), v["error"])
            continue
        spread = f"{v['step_sec']:.4g} ({v['step_sec_least']:.4g} .. {v['step_sec_most']:.4g})"
        table.add_row(
            name, str(v["rows"]), v.get("remat", f"padding {v.get('padding', 0):.0%}"), f"{v['audio_sec_per_sec']:,.1f}",
            number(v.get("ratio"), ".2f"), number(v.get("mfu"), ".1%"), spread, f"{v['peak_bytes'] / 1e9:.2f}",
            number(v.get("compile_sec"), ".1f"),
        )  # fmt: skip
    console.print(table)
    if "parts" in result:
        table = Table("forward and backward of", "ms", "useful TFLOP", "MFU")
        for part in result["parts"]:
            row = (f"{1000 * part['sec']:.1f}", f"{part['useful_tflop']:.3g}", number(part["mfu"], ".1%"))
            table.add_row(part["part"], *row)
        console.print(table)
