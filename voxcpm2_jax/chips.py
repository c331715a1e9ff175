"""What accelerators can do at best, by their makers: the one table behind MFU, `plan` and the arithmetic of meshes.

All figures are peaks, of one chip (`devices` tells how many JAX devices it shows as), none measured here. Memory is the
nominal one: a program gets a little less (15.75 of 16 GiB on v5e, 31.25 of 32 on v6e, as the TPU compiler says).

Sources: [tpu] docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, key specifications. [book] jax-ml/scaling-book,
chapters "TPUs" and "GPUs". [sheet] NVIDIA's data sheet of the card. [dgx] NVIDIA's data sheet of the DGX or NVL system with
it, whose network (one port for each GPU) is meant by `dcn`; other clusters have other networks.
"""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    name: str
    pattern: str  # found in jax.Device.device_kind
    peak_bf16_flops: float  # FLOP/s of dense matrix products
    hbm_bytes: float  # memory
    hbm_bytes_per_sec: float
    ici_bytes_per_sec: float  # of one link to another chip (ICI, NVLink; PCIe where there is neither), one way
    ici_links: int  # of a chip; on TPU two for each dimension of the torus
    dcn_bytes_per_sec: float | None  # the chip's share of its host's network, one way; None: the maker names none
    domain: int | None  # chips that these links join; None: a TPU slice, which says itself
    devices: int  # that JAX shows for a chip
    source: str

    @property
    def device_flops(self) -> float:
        """Peak bfloat16 FLOP/s of one JAX device."""
        return self.peak_bf16_flops / self.devices

    @property
    def device_hbm_bytes(self) -> float:
        """Memory of one JAX device."""
        return self.hbm_bytes / self.devices


_GIB = 2.0**30

# The first whose pattern is found in a device's kind is meant.
_TABLE = (
    #                                   FLOP/s    memory      bytes/s   link     links  dcn    domain devices source
    Chip("v3", r"TPU v3",               123e12,   32 * _GIB,  0.90e12,  100e9,     4,  None,     None, 2, "[book]"),
    Chip("v4", r"TPU v4",               275e12,   32 * _GIB,  1.20e12,   50e9,     6,  6.25e9,   None, 1, "[tpu], [book]"),
    Chip("v5e", r"TPU v5 ?(lite|e)",    197e12,   16 * _GIB,  0.819e12,  50e9,     4,  3.125e9,  None, 1, "[tpu]"),
    Chip("v5p", r"TPU v5",              459e12,   95 * _GIB,  2.765e12, 100e9,     6,  6.25e9,   None, 1, "[tpu]"),
    Chip("v6e", r"TPU v6",              918e12,   32 * _GIB,  1.60e12,  100e9,     4,  12.5e9,   None, 1, "[tpu]"),
    Chip("tpu7x", r"TPU ?v?7",         2307e12,  192 * _GIB,  7.38e12,  100e9,     6,  12.5e9,   None, 2, "[tpu]"),
    Chip("gb200", r"GB200",            2500e12,  186 * _GIB,  8.00e12,   50e9,    18,  50e9,       72, 1, "[dgx]"),
    Chip("b200", r"\bB200",            2250e12,  180 * _GIB,  8.00e12,   50e9,    18,  50e9,        8, 1, "[dgx]"),
    Chip("gh200", r"GH200",             990e12,   96 * _GIB,  4.00e12,   25e9,    18,  None,        1, 1, "[sheet]"),
    Chip("h200", r"\bH200",           989.4e12,  141 * _GIB,  4.80e12,   25e9,    18,  50e9,        8, 1, "[sheet], dcn [dgx]"),
    Chip("h100-pcie", r"H100 PCIe",     756e12,   80 * _GIB,  2.00e12,   64e9,     1,  None,        8, 1, "[sheet]"),
    Chip("h100-nvl", r"H100 NVL",       835e12,   94 * _GIB,  3.90e12,   25e9,    12,  None,        2, 1, "[sheet]"),
    Chip("h100", r"\bH100",           989.4e12,   80 * _GIB,  3.35e12,   25e9,    18,  50e9,        8, 1, "[sheet], dcn [dgx]"),
    Chip("h800", r"\bH800",           989.4e12,   80 * _GIB,  3.35e12,   25e9,     8,  50e9,        8, 1, "[sheet], dcn [dgx]"),
    Chip("a100-40gb", r"A100.*-40GB",   312e12,   40 * _GIB,  1.555e12,  25e9,    12,  25e9,        8, 1, "[sheet], dcn [dgx]"),
    Chip("a100", r"\bA100",             312e12,   80 * _GIB,  2.039e12,  25e9,    12,  25e9,        8, 1, "[sheet], dcn [dgx]"),
    Chip("a800", r"\bA800",             312e12,   80 * _GIB,  2.039e12,  25e9,     8,  25e9,        8, 1, "[sheet], dcn [dgx]"),
    Chip("l40s", r"L40S",               362e12,   48 * _GIB,  0.864e12,  32e9,     1,  None,        8, 1, "[sheet]"),
    Chip("l4", r"L4\b",                 121e12,   24 * _GIB,  0.300e12,  32e9,     1,  None,        8, 1, "[sheet]"),
    Chip("a10", r"A10\b",               125e12,   24 * _GIB,  0.600e12,  32e9,     1,  None,        8, 1, "[sheet]"),
    Chip("rtx4090", r"RTX 4090",      165.2e12,   24 * _GIB,  1.008e12,  32e9,     1,  None,        8, 1, "[sheet]"),
)  # fmt: skip

CHIPS = {chip.name: chip for chip in _TABLE}


def of_kind(device_kind: str) -> Chip | None:
    """The chip of a device by `jax.Device.device_kind`; None for one that the table does not have (a CPU)."""
    return next((chip for chip in _TABLE if re.search(chip.pattern, device_kind)), None)


LINKS_REACHED = 0.9  # share of the links' peak that large collectives get [book]


def rings(layout: tuple[int, ...]) -> tuple[bool, ...]:
    """Which dimensions of a TPU slice are closed.

    Of two dimensions (v5e, v6e) those of 16, the full pod's; of three (v4, v5p, tpu7x) all, if each is of whole cubes of
    4 x 4 x 4, and else none.
    """
    if len(layout) == 2:
        return tuple(n == 16 for n in layout)
    return (all(n % 4 == 0 for n in layout),) * len(layout)


def gather_bytes_per_sec(chip: Chip, layout: tuple[int, ...]) -> float:
    """Bytes a second that come into a chip in an all-gather over all chips of a layout; a reduce-scatter takes as long.

    A closed dimension of a torus brings them over two links, an open one over one. GPUs get them over NVLink, and from other
    domains no faster than all network ports of their own domain together.

    Args:
        layout: the dimensions of a TPU slice, such as (16, 16); of GPUs their number, such as (64,).
    """
    if chip.domain is None:
        links = sum(2 if is_ring else 1 for n, is_ring in zip(layout, rings(layout)) if n > 1)
        return LINKS_REACHED * chip.ici_bytes_per_sec * links
    rate = chip.ici_bytes_per_sec * chip.ici_links
    if math.prod(layout) > chip.domain:
        assert chip.dcn_bytes_per_sec, f"{chip.name}: the table has no network for more than {chip.domain}"
        rate = min(rate, chip.dcn_bytes_per_sec * chip.domain)
    return LINKS_REACHED * rate
