"""Reads a compiled TPU program: its collectives, from the text of the HLO, and the compiler's out-of-memory message.

A collective inside loops counts as often as they run. The path (op_name) of the operation or of its loop tells which part of
the model it belongs to, by the names of modules, and whether it is of the backward pass, by "transpose(".
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from voxcpm2_jax.plan.machine import Collective


def parse_exhausted(message: str) -> dict | None:
    """Bytes needed and available according to an out-of-memory message; None for another message."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    units = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = {}
    for name, pattern in (
        ("needed_bytes", r"(?:\(|Used |used )([\d.]+)([KMGTB]?)\)? (?:exceeds|of)"),
        ("hbm_bytes", r"(?:available HBM \(|of )([\d.]+)([KMGTB]?)\)?(?: hbm)?"),
    ):
        found = re.search(pattern, message)
        sizes[name] = None if found is None else int(float(found[1]) * units[found[2]])
    return sizes | {"message": message.splitlines()[0]}


_COLLECTIVES = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute"
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ROLES = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([^\s,}]+)")
_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
                "u64": 8, "f64": 8}  # fmt: skip
# Module name in an operation's path -> part.
_PART_OF = {"base_lm": "tslm", "residual_lm": "ralm", "feat_encoder": "locenc", "feat_decoder": "locdit"}


@dataclass(frozen=True)
class Instruction:
    name: str
    result: str
    op: str
    rest: str

    @property
    def path(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def stack_frame(self) -> str:
        """Number of the line of code in the program's table of stack frames."""
        found = re.search(r"stack_frame_id=(\d+)", self.rest)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([^\s,()]+)", self.rest.split("), ")[0])

    @property
    def called(self) -> dict[str, str]:
        """The computations that it runs, by role: "body", "calls", .."""
        return dict(re.findall(_ROLES, self.rest)) | {
            f"branch {i}": name.strip().lstrip("%")
            for listed in re.findall(r"branch_computations=\{([^}]*)\}", self.rest)
            for i, name in enumerate(listed.split(","))
        }


def read_collectives(text: str, mesh) -> tuple[list[Collective], int]:
    """The collectives of a compiled program, with the number of times that they run.

    Args:
        text: HLO; with several slices, the program of one of them.   mesh: the mesh that it was compiled for.
    Returns:
        (collectives, unknown loops). Equal collectives of a part and pass are one entry with their `times` added. Unknown
        loops is the number of loops without a known trip count, whose collectives count once.
    """
    instructions_of, entry = computations(text)
    found, unknown = Counter(), 0

    def visit(name: str, times: int, path: str) -> None:
        nonlocal unknown
        for one in instructions_of.get(name, {}).values():
            if one.op == "while":
                length = loop_length(one, instructions_of)
                unknown += length is None
                inner = one.path if part_of(one.path) != "rest" else path
                visit(one.called["body"], times * (length or 1), inner)
            elif one.op in ("call", "conditional"):
                for called in one.called.values():
                    visit(called, times, path)
            else:
                for collective in collectives_of(one, name, path, instructions_of, mesh):
                    found[collective] += times

    visit(entry, 1, "")
    return [dataclasses.replace(one, times=times) for one, times in found.items()], unknown


def collectives_of(one: Instruction, name: str, path: str, instructions_of, mesh) -> Iterator[Collective]:
    """The collectives that an instruction of computation `name` begins or, for a pair of start and done, ends with.

    The TPU compiler splits a gather into steps beside products: a fusion "async-collective-start" has it whole, those that
    follow have its steps, and "async-collective-done" has it again; it counts at the start.

    Args:
        path: of the loop around it, which says part and pass; "": those of the instruction.
    """
    instructions, base = instructions_of[name], one.op.removesuffix("-done")
    if re.fullmatch(_COLLECTIVES, base):
        start = instructions[one.operands[0]] if one.op.endswith("-done") else one
        # On TPU a reduce-scatter is a fusion of this name: an all-reduce of which each device keeps its slice.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else base
        yield _collective(kind, base, result_bytes(one.result), start, path or one.path or start.path, mesh)
    elif one.op == "send" and "_xla_megascale_transfer_type" in one.rest:
        kind = re.search(r'transfer_type="(\w+)"', one.rest)[1].lower().replace("_", "-")
        payload = result_bytes(one.result) - 4  # without a 4-byte counter
        yield _between_slices(kind, payload, path or one.path, mesh)
    elif one.op in ("fusion", "async-start") and not one.name.startswith("async-collective-done"):
        for called in one.called.values():
            if not called.startswith("async_collective_fusion"):
                for inner in instructions_of.get(called, {}).values():
                    yield from collectives_of(inner, called, path or one.path, instructions_of, mesh)


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations by name, each with its instructions by name; and the name of the entry computation."""
    found_in, current, entry = {}, {}, ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found_in[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = Instruction(*found.groups())
    return found_in, entry


def loop_length(loop: Instruction, instructions_of) -> int | None:
    """Trip count of a loop: as noted by the compiler, or the constant with which the condition compares a counter from 0."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = instructions_of[re.search(r"condition=%?([^\s,}]+)", loop.rest)[1]]
    for one in condition.values():
        if one.op == "compare" and "direction=LT" in one.rest:
            limit = condition.get(re.match(r"\s*%?[^\s,]+, %?([^\s,)]+)", one.rest)[1])
            if limit is not None and limit.op == "constant":
                return int(limit.rest.split(")")[0])
    return None


def result_bytes(result: str) -> int:
    shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
    return sum(_DTYPE_BYTES.get(d, 0) * math.prod(int(n) for n in dims.split(",") if n) for d, dims in shapes)


def part_of(path: str) -> str:
    """The part of the model that an operation belongs to."""
    return next((part for module, part in _PART_OF.items() if f"/{module}/" in f"/{path}/"), "rest")


def _collective(kind: str, op: str, num_bytes: int, start: Instruction, path: str, mesh) -> Collective:
    group = max(_groups(start.rest, mesh), key=len)
    if op == "reduce-scatter":
        num_bytes *= len(group)  # the result is one device's slice of the operand
    devices = mesh.devices.reshape(-1)
    places_in_mesh = [_coordinates(i, mesh.devices.shape) for i in group]
    axes = tuple(name for k, name in enumerate(mesh.axis_names) if len({c[k] for c in places_in_mesh}) > 1)
    places = [devices[i].coords for i in group]
    spans = tuple(len(set(along)) for along in zip(*places))
    return Collective(kind, part_of(path), "transpose(" in path, 0, num_bytes, len(group), len(group), spans, axes)


def _coordinates(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Mesh coordinates of device number `index`."""
    coordinates = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        coordinates.append(at)
    return tuple(reversed(coordinates))


def _between_slices(kind: str, payload: int, path: str, mesh) -> Collective:
    """A collective between slices, which the program of a slice shows as a transfer to its host."""
    slices = len({device.slice_index for device in mesh.devices.flat})
    return Collective(kind, part_of(path), "transpose(" in path, 0, payload, slices, 1, None, ("replica",))


def _groups(rest: str, mesh) -> list[list[int]]:
    """Groups of device numbers of a collective, from any notation that HLO has for them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return [_numbers(pair) for pair in re.findall(r"\{([\d,]+)", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return np.reshape(_iota(iota[2], iota[3]), _numbers(iota[1])).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}", rest
    )
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        inside = re.findall(r"'(\w+)'", named[5])
        names = list(sizes)
        ids = _numbers(named[4]) if named[4] else _iota(named[2] or str(math.prod(sizes.values())), named[3])
        order = [names.index(name) for name in names if name not in inside] + [names.index(name) for name in inside]
        placed = np.reshape(ids, tuple(sizes.values())).transpose(order)
        return placed.reshape(-1, math.prod(sizes[name] for name in inside)).tolist()
    assert "replica_groups={}" in rest, f"unknown notation of replica groups: {rest[:200]}"
    return [list(range(mesh.devices.size))]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(dims: str, order: str | None):
    """The permutation of 0, 1, .. that HLO writes as [dims]T(order)."""
    numbers = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return (numbers.transpose(_numbers(order)) if order else numbers).reshape(-1)
