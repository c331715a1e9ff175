"""A run that starts with fewer devices than it was planned for, because a slice or a node is missing.

The batch is a function of seed and step alone, so it stays. Each device gets more of its rows, and `accumulate` rises until
no device holds more rows at once than planned: memory for activations stays as planned. Of a mesh without -1 only replica
shrinks. Parameters and optimiser take as much memory on a device as before where every slice or node is a replica; if they
are split over all devices (data = -1 without TPU slices), each device holds more of them.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from voxcpm2_jax import sharding
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BackboneRun


class Size(NamedTuple):
    """Of a machine."""

    units: int  # slices or nodes
    devices: int  # of all units


def parse(text: str) -> Size:
    """Reads --planned=UNITSxDEVICES: 4x256 is four slices, or nodes, of 256 devices each."""
    if not (match := re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)):
        raise UserError(f"--planned={text}: expected slices or nodes, and devices of each, such as 4x256")
    return Size(int(match[1]), int(match[1]) * int(match[2]))


def fit(config: BackboneRun, planned: Size, present: Size, *, are_slices: bool) -> BackboneRun:
    """The run on the devices that are present; the same run if none is missing.

    Args:
        are_slices: units are TPU slices, which only the replica axis may cross.
    Raises:
        UserError: the batch of some stage cannot be split over these devices, or not without more rows on one of them.
    """
    if present.devices >= planned.devices:
        return config
    what = f"{present.devices} of {planned.devices} planned devices"
    old_mesh = sharding.fill(config.mesh, planned.devices, planned.units if are_slices else 1)
    mesh = config.mesh
    if -1 not in mesh:
        if mesh[0] * present.devices % planned.devices:
            raise UserError(f"{what}: of mesh {mesh} only replica {mesh[0]} can shrink, and not to that share")
        mesh = (mesh[0] * present.devices // planned.devices, *mesh[1:])
    new_mesh = sharding.fill(mesh, present.devices, present.units if are_slices else 1)
    shards, pieces = math.prod(new_mesh[:2]), math.prod(old_mesh[:2]) * config.accumulate
    if math.prod(new_mesh) != present.devices or math.prod(old_mesh) != planned.devices or not shards:
        raise UserError(f"{what}: mesh {config.mesh} (replica, data, tensor) does not fit both")
    for accumulate in range(max(config.accumulate, -(-pieces // shards)), config.batch.rows // shards + 1):
        if not any(batch.rows % (shards * accumulate) for batch in config.batches):
            return dataclasses.replace(config, mesh=mesh, accumulate=accumulate)
    rows = ", ".join(str(batch.rows) for batch in config.batches)
    raise UserError(
        f"{what}: a batch of {rows} rows cannot be split over {shards} devices (replica x data) so that none holds more rows "
        f"at once than on {planned.devices}; start with more or fewer, or change batch.rows"
    )


def sizes(config: BackboneRun, planned: Size, *, are_slices: bool) -> list[int]:
    """Numbers of units that the run can start with."""
    found = []
    for units in range(1, planned.units + 1):
        present = Size(units, planned.devices // planned.units * units)
        try:
            fit(config, planned, present, are_slices=are_slices)
        except UserError:
            continue
        found.append(units)
    return found


def describe(old: BackboneRun, new: BackboneRun, planned: Size, present: Size) -> str:
    """The line that says with how much of the planned machine the run starts, and what that changes."""
    changes = [f"{name} {getattr(old, name)} -> {getattr(new, name)}" for name in ("mesh", "accumulate")]
    kept = [change for change, name in zip(changes, ("mesh", "accumulate")) if getattr(old, name) != getattr(new, name)]
    units = f" ({present.devices * planned.units / planned.devices:g} of {planned.units} slices or nodes)"
    return f"started on {present.devices} of {planned.devices} planned devices{units}: {', '.join(kept)}; the batch is the same"
