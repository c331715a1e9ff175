"""Seconds of a compiled TPU program by the compiler's own clock, with no TPU: the text of the program and dumps of its kernels.

The TPU compiler chooses windows, layouts and fusions by a model of the chip, and writes that model's estimate into the
program: `"estimated_cycles"` of every fusion, reduction and most copies. `read` walks the program as the chip runs it (a loop
counts as often as it runs) and adds the estimates up by part of the model, pass, and line of code.

What has no estimate:

    Pallas kernels       the instructions of one step of the grid, from the compiler's dump of their schedule (`kernels_in`),
                         times the steps that do anything; or the time to move operands and results, if that is longer.
                         Every branch counts as taken
    copies, converts     bytes read and written at the memory's bandwidth
    transfers            bytes over the links' bandwidth. An asynchronous one runs from its start; only what has not arrived
                         when the program waits for it counts, as "wait". They go one after the other
    prefetches           copies into the chip's fast memory (copy-start, slice-start): nothing, they run beside the products
    branches             all of them

This is the compiler's opinion, not a measurement: see README.md of this folder for how it compares with published runs.
"""

import math
import pathlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from voxcpm2_jax.chips import LINKS_REACHED, Chip
from voxcpm2_jax.plan import hlo
from voxcpm2_jax.plan.machine import Machine

PASSES = ("forward", "recompute", "backward", "update")
# Lets libtpu write the schedule of every kernel and fusion to a folder; LIBTPU_INIT_ARGS of the compiling process.
DUMP_FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
         "copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done", "add-dependency", "domain",
         "opt-barrier", "recv", "recv-done", "send", "send-done", "dynamic-slice-start", "dynamic-slice-done",
         "dynamic-update-slice-start", "dynamic-update-slice-done", "custom-call-start", "custom-call-done"}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """What a line of code costs in one pass: its cycles, over all runs."""

    part: str  # a stack of flops.STACKS, or "rest"
    run: str  # a name in PASSES
    place: str  # "transformer.py:153"; "" if the compiler kept none
    scope: str  # the modules and named scopes around it, the innermost last
    kind: str  # "fusion", "copy", "kernel NAME", "wait for all-gather", ..
    cycles: float
    times: int


@dataclass(frozen=True)
class Clock:
    """A program's cycles by line, the dearest first."""

    lines: tuple[Line, ...]
    chip: Chip
    hidden_cycles: float = 0.0  # of transfers that ran beside work
    unscheduled: tuple[str, ...] = ()  # kernels without a schedule, which count by their bytes alone

    @property
    def cycles(self) -> float:
        return sum(line.cycles for line in self.lines)

    @property
    def seconds(self) -> float:
        return self.cycles / self.chip.clock_hz

    def seconds_by(self, *names: str) -> dict[tuple, float]:
        """Seconds by fields of a line, the longest first: `seconds_by("part", "run")`."""
        total = Counter()
        for line in self.lines:
            total[tuple(getattr(line, name) for name in names)] += line.cycles / self.chip.clock_hz
        return dict(total.most_common())

    def dearest(self, number: int) -> list[dict]:
        """The dearest lines as plain data: "sec" and the fields of a line."""
        names = ("run", "part", "place", "scope", "kind")
        return [{"sec": sec} | dict(zip(names, key)) for key, sec in list(self.seconds_by(*names).items())[:number]]


def kernels_in(folder: pathlib.Path, shares: Mapping[str, float] = {}) -> dict[str, float]:
    """Cycles of each Pallas kernel by the name of its instruction, from the schedules that DUMP_FLAGS wrote.

    A cycle issues one bundle of instructions. A step of the grid is the loop from the first "LB:" to its exit test.

    Args:
        shares: share of the grid's steps that do anything, for kernels whose names begin so.
    """
    found = {}
    for path in pathlib.Path(folder).glob("*final_bundles.txt"):
        name = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
        if name is None:
            continue
        text = path.read_text(errors="replace")
        grid = re.search(r"iteration_bounds: \(([\d, ]+)\)", text)
        bundles = [line for line in text.splitlines() if re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", line)]
        begin = next((i for i, line in enumerate(bundles) if " LB: " in line), None)
        end = max((i for i, line in enumerate(bundles) if "loop exit test" in line), default=None)
        if grid is None or begin is None or end is None:
            found[name[1]] = float(len(bundles))
        else:
            share = next((share for kernel, share in shares.items() if name[1].startswith(kernel)), 1.0)
            steps = share * math.prod(int(n) for n in grid[1].split(",") if n.strip())
            found[name[1]] = float(begin + (end - begin + 1) * steps)
    return found


def read(text: str, machine: Machine, mesh=None, kernels: Mapping[str, float] = {}) -> Clock:
    """The clock of a compiled program.

    Args:
        text: the scheduled HLO of `compiled.as_text()`.   machine: what it was compiled for.
        mesh: the mesh it was compiled for; None: a program of one device.   kernels: `kernels_in`.
    Raises:
        ValueError: the text has no estimates, because it was compiled for another platform.
    """
    if '"estimated_cycles"' not in text:
        raise ValueError("the program has no estimated cycles: expected one that was compiled for TPU")
    walk = _Walk(text, machine, mesh, kernels)
    walk.computation(walk.entry, 1, "")
    lines = [Line(*key, cycles, times) for key, (cycles, times) in walk.cost.items()]
    lines = tuple(sorted(lines, key=lambda line: -line.cycles))
    return Clock(lines, machine.chip, walk.hidden, tuple(sorted(walk.unscheduled)))


class _Walk:
    """Goes through a program in the order in which it runs."""

    def __init__(self, text: str, machine: Machine, mesh, kernels: Mapping[str, float]):
        self.computations, self.entry = hlo.computations(text)
        self.places = _places(text)
        self.machine, self.mesh, self.kernels = machine, mesh, kernels
        self.hz = machine.chip.clock_hz
        # The compiler schedules equal kernels once, under the name of one of them.
        calls = (one for of in self.computations.values() for one in of.values() if one.op == "custom-call")
        self.alike = {_signature(one): kernels[one.name] for one in calls if one.name in kernels}
        self.unscheduled: set[str] = set()
        self.cost: dict[tuple, tuple[float, int]] = {}
        self.hidden = 0.0

    def computation(self, name: str, times: int, path: str) -> float:
        """Adds the instructions of a computation that runs so many times -> cycles of one run."""
        now = links_free = network_free = sent = 0.0
        under_way: dict[str, tuple[float, float, str]] = {}  # transfer: when it has arrived, how long it takes, what it is
        for one in self.computations.get(name, {}).values():
            if one.op == "while":
                inner = one.path if hlo.part_of(one.path) != "rest" else path
                length = hlo.loop_length(one, self.computations) or 1
                now += length * self.computation(one.called["body"], times * length, inner)
                continue
            if one.op in ("call", "conditional"):
                now += sum(
                    self.computation(called, times, path) for called in one.called.values() if called in self.computations
                )
                continue
            transfers = list(hlo.collectives_of(one, name, path, self.computations, self.mesh)) if self.mesh else []
            length = sum(max(each.seconds(self.machine)) for each in transfers) / LINKS_REACHED * self.hz
            kind = f"wait for {transfers[0].kind}" if transfers else ""
            if one.op.endswith("-start") or one.name.startswith("async-collective-start"):
                begin = max(now, links_free) if transfers else now  # what XLA itself starts shows its bytes when it is done
                under_way[one.name] = begin + length, length, kind
                links_free = begin + length if transfers else links_free
            elif (done := self._ends(one, under_way)) is not None:
                arrival, known, known_kind = under_way.pop(done)
                if transfers:
                    arrival = links_free = max(arrival, links_free) + length
                length, kind = length or known, kind or known_kind
                if length:
                    now += self._wait(one, path, kind, arrival - now, length, times)
            elif transfers and one.op == "send":  # to another slice, over the network
                network_free, sent = max(now, network_free) + length, sent + length
            elif one.op == "recv-done" and sent:
                now += self._wait(one, path, "wait for other slices", network_free - now, sent, times)
                sent = 0.0
            elif transfers:
                links_free = max(now, links_free) + length
                now += self._wait(one, path, kind, links_free - now, length, times)
            elif one.op not in _FREE:
                now += self._add(one, path, *self._cycles(one, name), times)
        return now

    def _ends(self, one, under_way) -> str | None:
        """The start that an instruction ends; a fusion "async-collective-done.N" does not name it among its operands."""
        if one.name.startswith("async-collective-done"):
            start = one.name.replace("-done", "-start", 1)
        else:
            start = one.operands[0] if one.op.endswith("-done") and one.operands else ""
        return start if start in under_way else None

    def _wait(self, one, path: str, kind: str, wait: float, length: float, times: int) -> float:
        """Adds what of a transfer the program waits for; the rest was hidden."""
        wait = min(max(0.0, wait), length)
        self.hidden += times * (length - wait)
        return self._add(one, path, kind, wait, times)

    def _add(self, one, path: str, kind: str, cycles: float, times: int) -> float:
        inside = path and hlo.part_of(one.path) == "rest"
        where = path if inside else one.path
        place = self.places.get(one.stack_frame, "")
        key = hlo.part_of(where), _pass_of(where), place, _scope(where), kind
        total, runs = self.cost.get(key, (0.0, 0))
        self.cost[key] = total + cycles * times, runs + times
        return cycles

    def _cycles(self, one, name: str) -> tuple[str, float]:
        """What an instruction is called, and its cycles."""
        if found := re.search(r'"estimated_cycles":"(\d+)"', one.rest):
            return one.op, float(found[1])
        instructions = self.computations[name]
        operands = (instructions[operand].result for operand in one.operands if operand in instructions)
        moved = sum(map(hlo.result_bytes, (one.result, *operands)))
        by_bytes = moved / self.machine.hbm_bytes_per_sec * self.hz
        if one.op == "custom-call":
            if "tpu_custom_call" not in one.rest:
                return one.op, 0.0  # allocations and markers
            cycles = self.kernels.get(one.name) or self.alike.get(_signature(one), 0.0)
            if not cycles:
                self.unscheduled.add(_base(one.name))
            return f"kernel {_base(one.name)}", max(cycles, by_bytes)
        return one.op, by_bytes


def _base(name: str) -> str:
    """The name of a kernel, without the number that tells its calls apart."""
    return re.sub(r"[.\d]*$", "", name)


def _signature(one) -> tuple[str, str]:
    """What equal kernels share: name, and dtypes and shapes of the results."""
    return _base(one.name), " ".join(re.findall(r"\w+\[[\d,]*\]", one.result))


def _pass_of(path: str) -> str:
    if "transpose(" not in path:
        return "forward" if "jvp(" in path else "update"
    return "recompute" if "rematted_computation" in path else "backward"


def _scope(path: str) -> str:
    """The modules around an operation, without what JAX adds."""
    found = re.search(r"/layers/(.*)", path)
    names = (found[1] if found else path).split("/")[:-1]
    return "/".join(name for name in names if "(" not in name and name not in ("while", "body", "closed_call", "checkpoint"))


def _places(text: str) -> dict[str, str]:
    """Stack frame -> "file.py:line", from the tables at the head of the program."""
    tables = {}
    for name in ("FileNames", "FileLocations", "StackFrames"):
        found = re.search(rf"^{name}\n(.*?)\n\n", text, re.S | re.M)
        tables[name] = dict(line.split(" ", 1) for line in found[1].splitlines()) if found else {}
    files = {number: pathlib.PurePath(name.strip('"')).name for number, name in tables["FileNames"].items()}
    lines = {}
    for number, location in tables["FileLocations"].items():
        file, line = re.search(r"file_name_id=(\d+)", location), re.search(r"\bline=(\d+)", location)
        lines[number] = f"{files[file[1]]}:{line[1]}" if file and line else ""
    frames = {}
    for number, frame in tables["StackFrames"].items():
        found = re.search(r"file_location_id=(\d+)", frame)
        frames[number] = lines.get(found[1], "") if found else ""
    return frames
