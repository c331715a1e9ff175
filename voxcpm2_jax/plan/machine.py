"""The machines that `plan` knows, and how long a collective takes on their links.

A machine is some slices of chips. Chips of a slice are joined by fast links (ICI: a TPU's torus, or NVLink), slices by a
network (DCN). `Machine` gives the rates of both for a group of chips; `Collective` turns bytes into seconds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from voxcpm2_jax.chips import Chip, links_used, rings

# ---- machines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Some slices of chips: TPU slices, or NVLink domains of GPUs."""

    name: str
    chip: Chip
    slices: int
    torus: tuple[int, ...] | None  # chips of a TPU slice along each dimension; None for GPUs, all equally near
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
        """A device's share of the network."""
        return self.chip.network_bytes_per_sec / self.chip.devices

    def ici_bytes_per_sec(self, spans: Sequence[int] | None) -> float:
        """Peak bytes per second that a device takes in over its fast links during a collective; see `chips.links_used`.

        Args:
            spans: chips that the group covers along each dimension of the torus; None without a torus.
        """
        link = self.chip.ici_bytes_per_sec / self.chip.devices
        if self.torus is None or spans is None:
            return link * self.chip.ici_links
        return link * max(links_used(spans, self.torus), 1)

    def detour(self, spans: Sequence[int] | None) -> float:
        """How many times longer an all-to-all takes than its bytes need over a device's own links.

        Most bytes pass through other chips. Half of them cross the middle of a dimension of n chips: n / 4 times one chip's
        bytes over one link, or over two on a ring.
        """
        if self.torus is None or spans is None:
            return 1.0
        crossed = max((n / (8 if self._is_ring(i, n) else 4) for i, n in enumerate(spans) if n > 1), default=0.0)
        return max(1.0, crossed * self.ici_bytes_per_sec(spans) * self.chip.devices / self.chip.ici_bytes_per_sec)

    def _is_ring(self, dimension: int, span: int) -> bool:
        return span == self.torus[dimension] and rings(self.torus)[dimension]

    def spans(self, devices: int) -> tuple[int, ...] | None:
        """Chips along each dimension of the torus that so many neighbouring devices cover."""
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
    """A collective that one update runs `times` times."""

    kind: str  # "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"
    part: str  # a stack of flops.STACKS, or "rest"
    backward: bool
    times: int
    whole_bytes: int  # of the gathered result or the reduced operand
    group: int  # participating devices
    group_in_slice: int  # participating devices of one slice
    spans: tuple[int, ...] | None = None  # chips that the group covers along the dimensions of the torus
    axes: tuple[str, ...] = ()  # mesh axes that it runs over

    def wire_bytes(self) -> tuple[float, float]:
        """(ICI, DCN) bytes that a device takes in during one run.

        Each device receives its share of what its slice lacks over the network; the slice then spreads it over its links.
        """
        n, m, whole = self.group, self.group_in_slice, self.whole_bytes
        if self.kind == "collective-permute":
            return (0.0, whole) if m == 1 < n else (whole, 0.0)
        if self.kind == "all-to-all":
            return whole * (m - 1) / n, whole * (n - m) / n
        twice = 2.0 if self.kind == "all-reduce" else 1.0
        return twice * whole * (m - 1) / m, twice * whole * (n - m) / n / m

    def seconds(self, machine: Machine) -> tuple[float, float]:
        """(ICI, DCN) seconds of one run at the links' peak."""
        ici, dcn = self.wire_bytes()
        spans = self.spans
        if self.kind == "collective-permute" and machine.torus is not None:
            spans = (1,) * len(machine.torus)  # one link leads to a neighbour
        detour = machine.detour(spans) if self.kind == "all-to-all" else 1.0
        return ici * detour / machine.ici_bytes_per_sec(spans), dcn / machine.dcn_bytes_per_sec
