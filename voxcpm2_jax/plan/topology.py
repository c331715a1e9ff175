"""Reads --topology: a machine, and changes of the run for that machine.

    --topology=[SLICESx]KIND:AxB[xC][,FIELD=VALUE..]    v5e:16x16   4xv6e:8x8   v5p:8x8x8,rows=512,mesh=1x512x1
    --topology=GPUSxKIND[,FIELD=VALUE..]                8xh100   64xh100,rows=256,mesh=8x8x1

Fields: rows (per batch), accumulate, remat, remat_local, remat_locdit, locdit_at_once, products, mesh (REPLICAxDATAxTENSOR).
The result is a `Case`. `check` also accepts plain numbers of devices, where the chip does not matter: 32, or 4x64 for four
slices of 64.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from voxcpm2_jax import sharding
from voxcpm2_jax.chips import CHIPS, check_products
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun, BatchConfig
from voxcpm2_jax.plan import roofline
from voxcpm2_jax.plan.machine import Machine

_PODS = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TPU_SHAPES = {
    "v5e": _PODS,
    "v6e": _PODS,
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
            "16x16x24"),
}  # fmt: skip
GPUS = tuple(name for name, chip in CHIPS.items() if not chip.pattern.startswith("TPU"))


@dataclass(frozen=True)
class Case:
    """A run on a machine; `mesh` has no -1."""

    machine: Machine
    config: BackboneRun

    @property
    def mesh(self) -> tuple[int, int, int]:
        return sharding.fill(self.config.mesh, self.machine.devices, _islands(self.machine))

    @property
    def batches(self) -> list[BatchConfig]:
        """The batch sizes to plan, in the order of the run's stages.

        Of sizes that differ in rows alone only the largest is planned, and any that the mesh cannot split.
        """
        budgets, most = self.config.batches, {}
        for batch in budgets:
            alike = dataclasses.replace(batch, rows=1)
            most[alike] = max(most.get(alike, 0), batch.rows)
        return [b for b in budgets if b.rows == most[dataclasses.replace(b, rows=1)] or mismatch(self, b)]


def parse(text: str, config: BackboneRun) -> Case:
    """The case of --topology=TEXT.

    Raises:
        UserError: unknown chip, shape or field; the message lists the known ones.
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
            raise UserError(f"--topology={text}: expected a multiple of {domain}, the GPUs of a machine, got {count}")
        machine = Machine(name, chip, count // domain, None, domain)
    else:
        raise UserError(f"--topology={text}: expected {_known()}")
    config = _with_fields(text, config, fields)
    check_products(config.products, machine.chip)
    return Case(machine, config)


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
        elif name == "locdit_at_once":
            config = dataclasses.replace(config, locdit_at_once=count(value))
        elif name in ("remat", "remat_local", "remat_locdit", "products"):
            config = dataclasses.replace(config, **{name: value})
        elif name == "mesh" and re.fullmatch(r"(-1|\d+)x(-1|\d+)x\d+", value):
            config = dataclasses.replace(config, mesh=tuple(int(n) for n in value.split("x")))
        else:
            raise UserError(
                f"--topology={text}: {field!r} is none of rows=N, accumulate=N, remat=NAME, remat_local=NAME, "
                "remat_locdit=NAME, locdit_at_once=N, products=NAME, mesh=REPLICAxDATAxTENSOR; other fields are set for all "
                "topologies, by --config.NAME=VALUE"
            )
    return config


def with_rows(config: BackboneRun, rows: int) -> BackboneRun:
    """The run with so many rows per batch; those of its stages follow."""
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, rows=rows))


def mismatch(case: Case, batch: BatchConfig) -> str | None:
    """Why the mesh does not suit the machine or the batch does not suit the mesh, in one line; None if all is well."""
    machine = case.machine
    return _mismatch(case.mesh, batch, case.config.accumulate, machine.name, machine.devices, _islands(machine))


def check(text: str, config: BackboneRun) -> BackboneRun:
    """Checks mesh and batches of all stages for --topology=TEXT, without planning -> the run with the fields of TEXT.

    Raises:
        UserError: as `parse`, or a stage that cannot run on this topology; all such stages are named.
    """
    name, *fields = text.split(",")
    if match := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", name):
        config, islands = _with_fields(text, config, fields), int(match[1] or 1)
        devices = islands * int(match[2])
    else:
        case = parse(text, config)
        config, islands, devices = case.config, _islands(case.machine), case.machine.devices
    mesh = sharding.fill(config.mesh, devices, islands)
    problems = [_mismatch(mesh, batch, config.accumulate, name, devices, islands) for batch in config.batches]
    if any(problems):
        named = "; ".join(dict.fromkeys(filter(None, problems)))
        raise UserError(f"--topology={text}: {named}: change batch.rows (all stages follow), accumulate or mesh of the config")
    return config


def has_slices(text: str) -> bool:
    """Whether --topology=TEXT is of TPU slices, or plain devices in slices (4x64)."""
    return bool(re.match(r"\d+x\d+(,|$)|(\d+x)?[a-z]\w*:", text))


def _islands(machine: Machine) -> int:
    """Parts of a machine that only the replica axis may cross."""
    return machine.slices if machine.torus else 1


def _mismatch(mesh, batch: BatchConfig, accumulate: int, name: str, devices: int, islands: int) -> str | None:
    if math.prod(mesh) != devices:
        return f"mesh {mesh_name(mesh)} (replica, data, tensor) has {math.prod(mesh)} devices; {name} has {devices}"
    if mesh[0] % islands:
        return f"mesh {mesh_name(mesh)}: replica must be a multiple of the {islands} slices; no other axis may cross slices"
    pieces = roofline.row_shards(mesh) * accumulate
    if batch.rows % pieces:
        return f"{batch.rows} rows of {batch.slots} slots cannot be split into {pieces} parts (replica x data x accumulate)"
    return None


def mesh_name(mesh: Sequence[int]) -> str:
    """REPLICAxDATAxTENSOR."""
    return "x".join(map(str, mesh))
