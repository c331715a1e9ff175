"""Peak speed, memory and links of accelerators: the one table behind MFU, `plan` and the choice of a mesh.

All figures are the vendors' peaks for one chip; none was measured here. Some chips show as two JAX devices (`devices`).
Memory is nominal: a program gets a little less (the TPU compiler reports 15.75 of 16 GiB on v5e, 31.25 of 32 on v6e).

Sources: [tpu] docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, key specifications. [book] jax-ml/scaling-book,
chapters "TPUs" and "GPUs". [sheet] NVIDIA's data sheet of the card. [dgx] NVIDIA's data sheet of the DGX or NVL system:
`dcn` is that system's network, one port for each GPU; other clusters have other networks.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from voxcpm2_jax.config.plain import UserError


@dataclass(frozen=True)
class Chip:
    name: str
    pattern: str  # regular expression to find in jax.Device.device_kind
    peak_bf16_flops: float  # FLOP/s of dense matrix products
    hbm_bytes: float  # memory
    hbm_bytes_per_sec: float
    ici_bytes_per_sec: float  # of one link to another chip, one way: ICI or NVLink, else PCIe
    ici_links: int  # links of a chip; on TPU two for each dimension of the torus
    dcn_bytes_per_sec: float | None  # the chip's share of its host's network, one way; None: the vendor names none
    domain: int | None  # GPUs that NVLink (or PCIe) joins; None for TPU, where the size of the slice says it
    devices: int  # JAX devices of a chip
    source: str

    @property
    def device_flops(self) -> float:
        """Peak bfloat16 FLOP/s of one JAX device."""
        return self.peak_bf16_flops / self.devices

    @property
    def device_hbm_bytes(self) -> float:
        """Memory of one JAX device."""
        return self.hbm_bytes / self.devices

    @property
    def eight_bits(self) -> tuple[str, ...]:
        """The 8-bit products that it does at twice the bfloat16 rate: names in config/run.py's PRODUCTS."""
        return tuple(products for products, names in _EIGHT_BITS.items() if self.name in names)

    @property
    def clock_hz(self) -> float:
        """TPU: cycles per second, in which the compiler counts time: the peak over what the matrix units do in a cycle."""
        return self.peak_bf16_flops / _FLOPS_PER_CYCLE[self.name]

    @property
    def compiler_options(self) -> dict[str, str]:
        """XLA options of the train step on this chip; plan/README.md has the clock with and without them."""
        return _COMPILER_OPTIONS.get(self.name, {})

    @property
    def network_bytes_per_sec(self) -> float:
        """The chip's share of the network between slices or hosts; the rate of one link if the vendor names no network."""
        return self.dcn_bytes_per_sec or self.ici_bytes_per_sec


_GIB = 2.0**30

# Of all matrix units of a chip, each a square that multiplies and adds in every cell [book]: 1.05, 1.50, 1.75 and 1.75 GHz.
_FLOPS_PER_CYCLE = {"v4": 2 * 8 * 128**2, "v5e": 2 * 4 * 128**2, "v5p": 2 * 8 * 128**2, "v6e": 2 * 4 * 256**2}

# As MaxText sets them. v6e: the fast memory that one fusion may fill; on v5e 32768 would save 4 % of the language models' time,
# but the compiler then needs several times as long. v5p: gathers run beside products; on v5e they do so anyway.
_COMPILER_OPTIONS = {
    "v6e": {"xla_tpu_scoped_vmem_limit_kib": "98304"},
    "v5p": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
}

# GPUs by their data sheets [sheet]. TPUs by the TPU compiler, because the documents name an int8 rate also for chips that only
# store 8 bits: its cycles for an 8192^3 product in bfloat16 over those in int8 and fp8 (tests/measure_products.py, jax 0.10.2):
#     v4  0.93, 0.85     v5e  2.14, 1.06     v5p  1.89, 0.97     v6e  1.62, 1.16     tpu7x  0.88, 2.06
_ADA_AND_LATER = ("gb200", "b200", "gh200", "h200", "h100-pcie", "h100-nvl", "h100", "h800", "l40s", "l4", "rtx4090")
_EIGHT_BITS = {
    "int8": ("v5e", "v5p", "v6e", "a100-40gb", "a100", "a800", "a10", *_ADA_AND_LATER),
    "fp8": ("tpu7x", *_ADA_AND_LATER),
}

# `of_kind` takes the first chip whose pattern matches, so that order matters.
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
    """The chip with this `jax.Device.device_kind`; None if the table has no such chip (a CPU, for one)."""
    return next((chip for chip in _TABLE if re.search(chip.pattern, device_kind)), None)


def check_products(products: str | None, chip: Chip | None, name: str = "") -> None:
    """Raises UserError if a chip is not known to multiply in 8 bits as `products` says, faster than in bfloat16.

    Args:
        chip: None: it is not in the table.   name: of the device, if the table has another one.
    """
    known = chip.eight_bits if chip else ()
    if products is not None and products not in known:
        others = f"expected products {' or '.join(known)}, or None" if known else "expected products None"
        raise UserError(
            f"products {products!r}: {name or chip.name} is not known to gain by them (_EIGHT_BITS in chips.py); {others}"
        )


LINKS_REACHED = 0.9  # share of the links' peak that large collectives reach [book]


def rings(torus: tuple[int, ...]) -> tuple[bool, ...]:
    """Whether each dimension of a TPU slice wraps around.

    In two dimensions (v5e, v6e) only a dimension of 16 does, that of the full pod. In three dimensions (v4, v5p, tpu7x) all
    do if every one is a multiple of 4, otherwise none.
    """
    if len(torus) == 2:
        return tuple(n == 16 for n in torus)
    return (all(n % 4 == 0 for n in torus),) * len(torus)


def links_used(group: Sequence[int], torus: tuple[int, ...]) -> int:
    """Links of a TPU chip that bring in data during a collective.

    Two for each dimension that wraps around and is covered whole, one for each other dimension of more than one chip: the
    chip at the end of a line has no second neighbour.

    Args:
        group: chips of the collective along each dimension of the torus (trailing coordinates of size 1 may follow).
    """
    covered = zip(group, torus, rings(torus))
    return sum(2 if span == size and is_ring else 1 for span, size, is_ring in covered if span > 1)


def gather_bytes_per_sec(chip: Chip, group: Sequence[int], torus: tuple[int, ...] | None = None) -> float:
    """Bytes per second that a chip takes in during an all-gather; a reduce-scatter of the same bytes takes as long.

    GPUs gather over NVLink; across domains (machines) no faster than all network ports of a domain together.

    Args:
        group: chips along each dimension of a TPU slice, such as (16, 16); for GPUs their number, such as (64,).
        torus: dimensions of the TPU slice; None: the group is the whole slice.
    """
    if chip.domain is None:
        return LINKS_REACHED * chip.ici_bytes_per_sec * max(links_used(group, torus or tuple(group)), 1)
    rate = chip.ici_bytes_per_sec * chip.ici_links
    if math.prod(group) > chip.domain:
        rate = min(rate, chip.network_bytes_per_sec * chip.domain)
    return LINKS_REACHED * rate
