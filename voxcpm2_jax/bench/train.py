"""TODO bench.train."""

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
    """The figures would be of a wrong computation; its message is the one line to show."""


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
    """Figures of this machine.

    Args:
        config: model, budgets, optimiser, mesh; stages are not looked at.   rows, remats: what to try; none: the config's.
        num_rounds: updates that are timed, of the reference passes over all clips.   parts: times every part as well.
        reference_rows: clips of a batch of the reference.
    Raises:
        UserError: an impossible config, or no reference to compare with.
        Disagreement: the check failed; nothing was timed.
    """
    if num_rounds < 1 or reference_rows < 1:
        raise UserError(f"expected at least one round and one row, got {num_rounds} and {reference_rows}")
    variants = [
        dataclasses.replace(config, remat=remat, stages=(), batch=dataclasses.replace(config.batch, rows=n))
        for n in rows or (config.batch.rows,)
        for remat in remats or (config.remat,)
    ]
    say("checking loss and gradients against the CPU" + (" and losses against the reference" if against_reference else ""))
    with _Child("check", variants[0], against_reference=against_reference) as child:
        check = child.hello
    say(f"{check['device']} x {check['devices']}, jax {check['jax']}; {_check_in_words(check)}")
    if check["failed"]:
        raise Disagreement(f"{'; '.join(check['failed'])}: nothing was timed")

    result = {name: check[name] for name in ("device", "devices", "platform", "jax", "cpu_cores")} | {"check": check["errors"]}
    result["variants"] = []
    with contextlib.ExitStack() as stack:
        reference = partial(_Child, "reference", variants[0], rows=reference_rows)
        takes_turns = against_reference and check["platform"] == "cpu"
        beside = stack.enter_context(reference()) if takes_turns else None
        for variant in variants:
            say(f"timing rows {variant.batch.rows}, remat {variant.remat}")
            result["variants"].append(_measure(variant, num_rounds, beside if variant is variants[0] else None))
            say(_variant_in_words(result["variants"][-1]))
        if against_reference:
            say("timing the reference")
            alone = beside or stack.enter_context(reference())
            for _ in range(0 if takes_turns else num_rounds):
                alone.round()
            result["reference"] = alone.figures()
            _compare(result)
    if parts:
        say("timing parts")
        with _Child("parts", variants[0], rounds=num_rounds) as child:
            result["parts"] = child.hello["parts"]
    return result


def _measure(variant: BackboneRun, num_rounds: int, beside: "_Child | None") -> dict:
    with _Child("ours", variant) as child:
        for _ in range(num_rounds):
            if "error" in child.hello:
                break
            child.round()
            if beside is not None:
                beside.round()
        return child.figures()


def _compare(result: dict) -> None:
    ours, theirs = result["variants"], result["reference"]
    if "error" in theirs:
        return
    for figures in ours:
        if "error" not in figures:
            figures["ratio"] = figures["audio_sec_per_sec"] / theirs["audio_sec_per_sec"]
    if result["platform"] == "cpu" and "error" not in ours[0]:
        # Rounds that took turns met the same load: their own ratios, and the middle one of these.
        scale = (ours[0]["audio_sec"] / theirs["audio_sec"]) if theirs["audio_sec"] else 1.0
        ours[0]["ratio"] = statistics.median(scale * b / a for a, b in zip(ours[0]["rounds_sec"], theirs["rounds_sec"]))


# ---- processes -------------------------------------------------------------------------------------------------------


class _Child:
    """A process that does one job: it says hello with what it found, then does a round whenever told; a context manager."""

    def __init__(self, job: str, config: BackboneRun, **options):
        self._rounds: list[float] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "voxcpm2_jax.bench.train_jobs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with contextlib.ExitStack() as unless_it_answers:
            unless_it_answers.callback(self._end)
            self._last = self.hello = self._ask({"job": job, "config": to_dict(config)} | options)
            unless_it_answers.pop_all()

    def _ask(self, question) -> dict:
        with contextlib.suppress(BrokenPipeError):  # what it died of is on standard error
            print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a measuring process ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        return answer

    def round(self) -> None:
        if "error" not in self._last:
            self._last = self._ask("round")
            self._rounds += [self._last["sec"]] if "sec" in self._last else []

    def figures(self) -> dict:
        """What it said, and the times of its rounds."""
        figures = self.hello | self._last
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
        """Tells it that no more questions come -> its exit code."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        return self._process.wait()

    def __exit__(self, *_):
        if self._end() < 0:
            raise RuntimeError(f"a measuring process was killed by signal {-self._process.returncode}")


def _check_in_words(check: dict) -> str:
    return "off, against float32 on the CPU: " + ", ".join(f"{name} {value:.1e}" for name, value in check["errors"].items())


def _variant_in_words(v: dict) -> str:
    name = f"rows {v.get('rows', '?')}, remat {v.get('remat', '?')}"
    return f"{name}: {v['error']}" if "error" in v else f"{name}: {v['audio_sec_per_sec']:,.1f} s of audio a second"


def show(result: dict) -> None:
    """Tables for people, on standard error."""
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
