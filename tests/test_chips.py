"""The table of chips: device kinds are found in it, and its figures have plausible units."""

import pytest

from voxcpm2_jax import chips
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import PRODUCTS

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v3", "v3"), ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"), ("TPU v6e", "v6e"), ("TPU7x", "tpu7x"), ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA H100 NVL", "h100-nvl"), ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"), ("NVIDIA B200", "b200"), ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA L4", "l4"), ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)  # fmt: skip
def test_a_device_finds_its_chip(kind, name):
    assert chips.of_kind(kind).name == name


def test_an_unknown_device_has_none():
    assert chips.of_kind("cpu") is None and chips.of_kind("NVIDIA L400") is None


def test_products_in_8_bits_where_they_pay():
    for name, products in (("v5e", "int8"), ("v6e", "int8"), ("tpu7x", "fp8"), ("h100", "int8"), ("h100", "fp8"), ("v4", None)):
        chips.check_products(products, chips.CHIPS[name])
    for name, products, expected in (
        ("v5e", "fp8", "expected products int8, or None"),
        ("tpu7x", "int8", "expected products fp8, or None"),
        ("v4", "int8", "expected products None"),
    ):
        with pytest.raises(UserError, match=f"products '{products}': {name} is not known to gain by them .*; {expected}$"):
            chips.check_products(products, chips.CHIPS[name])
    with pytest.raises(UserError, match="NVIDIA L400 is not known"):
        chips.check_products("int8", chips.of_kind("NVIDIA L400"), "NVIDIA L400")
    assert set(chips._EIGHT_BITS) == set(PRODUCTS) and {n for of in chips._EIGHT_BITS.values() for n in of} <= set(chips.CHIPS)


def test_figures_per_chip_and_per_device():
    chip = chips.CHIPS["tpu7x"]
    assert (chip.device_flops, chip.device_hbm_bytes) == (chip.peak_bf16_flops / 2, 96 * 2**30)
    assert len(chips.CHIPS) == len(chips._TABLE)
    for chip in chips.CHIPS.values():
        # All chips do 100 to 700 bfloat16 FLOPs per byte of memory traffic; a figure in a wrong unit would be far outside.
        assert 100 < chip.peak_bf16_flops / chip.hbm_bytes_per_sec < 700, chip.name
        assert 16 <= chip.hbm_bytes / 2**30 <= 192 and 10e9 < chip.ici_bytes_per_sec <= 100e9, chip.name
        assert chip.dcn_bytes_per_sec is None or chip.dcn_bytes_per_sec < chip.ici_bytes_per_sec * chip.ici_links, chip.name
