"""TODO plan.machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from voxcpm2_jax.chips import Chip, rings

# ---- machines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Chips joined by fast links into `slices`, and slices by a network."""

    name: str
    chip: Chip
    slices: int  # TPU slices; NVLink domains of GPUs
    torus: tuple[int, ...] | None  # chips of a slice along each dimension; None: all of a slice reach all others alike
    slice_chips: int

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.slices * self.slice_chips * self.chip.devices

    @property
    def slice_devices(self) -> int:
        return self.slice_chips * self.chip.devices

    @property
    def flops(self) -> float:
        return self.chip.device_flops

    @property
    def hbm_bytes(self) -> float:
        return self.chip.device_hbm_bytes

    @property
    def hbm_bytes_per_sec(self) -> float:
        return self.chip.hbm_bytes_per_sec / self.chip.devices

    @property
    def dcn_bytes_per_sec(self) -> float:
        """The network's share of a device; the slowest link, where the maker names no network."""
        return (self.chip.dcn_bytes_per_sec or self.chip.ici_bytes_per_sec) / self.chip.devices

    def links(self, spans: Sequence[int] | None) -> float:
        """Bytes a second that a device of a collective takes in over its links.

        Args:
            spans: chips that the group covers along each dimension of the torus, and 1 along what more coordinates JAX has;
                None where there is no torus.
        A ring fills both links of a dimension. The line of a dimension that is not closed, or not covered whole, fills one:
        its end has no other.
        """
        link = self.chip.ici_bytes_per_sec / self.chip.devices
        if self.torus is None or spans is None:
            return link * self.chip.ici_links
        used = sum(2 if self._is_ring(i, n) else 1 for i, n in enumerate(spans) if n > 1)
        return link * max(used, 1)

    def detour(self, spans: Sequence[int] | None) -> float:
        """How much longer an all-to-all takes than a device's bytes over its links: most go through others on their way.

        Half of the bytes cross the middle of a dimension of n chips: n / 4 times a chip's over one link, on a ring over two.
        """
        if self.torus is None or spans is None:
            return 1.0
        crossed = max((n / (8 if self._is_ring(i, n) else 4) for i, n in enumerate(spans) if n > 1), default=0.0)
        return max(1.0, crossed * self.links(spans) * self.chip.devices / self.chip.ici_bytes_per_sec)

    def _is_ring(self, dimension: int, span: int) -> bool:
        return span == self.torus[dimension] and rings(self.torus)[dimension]

    def spans(self, devices: int) -> tuple[int, ...] | None:
        """Chips along each dimension of a group of that many devices of one slice, side by side."""
        if self.torus is None:
            return None
        left, spans = max(devices // self.chip.devices, 1), []
        for size in reversed(self.torus):
            n = math.gcd(left, size)
            spans.append(n)
            left //= n
        return tuple(reversed(spans))


# ---- collectives -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """One collective of the program, `times` an update."""

    kind: str  # "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
    part: str  # a stack, or "rest"
    backward: bool
    times: int
    whole_bytes: int  # the gathered result, the reduced operand
    group: int  # devices that take part
    group_in_slice: int  # those of them in one slice
    spans: tuple[int, ...] | None = None  # chips that the group covers along the slice's dimensions
    axes: tuple[str, ...] = ()  # of the mesh

    def wire_bytes(self) -> tuple[float, float]:
        """(ICI, DCN) bytes that a device takes in, once.

        Between slices each device moves its share of what its slice lacks; inside, the links spread it.
        """
        n, m, whole = self.group, self.group_in_slice, self.whole_bytes
        if self.kind == "collective-permute":
            return (0.0, whole) if m == 1 < n else (whole, 0.0)
        if self.kind == "all-to-all":
            return whole * (m - 1) / n, whole * (n - m) / n
        twice = 2.0 if self.kind == "all-reduce" else 1.0
        return twice * whole * (m - 1) / m, twice * whole * (n - m) / n / m

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """(ICI, DCN) seconds, once, at the links' peak."""
        ici, dcn = self.wire_bytes()
        spans = self.spans
        if self.kind == "collective-permute" and machine.torus is not None:
            spans = (1,) * len(machine.torus)  # a neighbour is reached over one link
        slower = machine.detour(spans) if self.kind == "all-to-all" else 1.0
        return ici * slower / machine.links(spans), dcn / machine.dcn_bytes_per_sec
