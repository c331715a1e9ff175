"""The arithmetic of `plan` is what a hand gets, and its calibration what was measured."""

import dataclasses
import math

import jax
import pytest

from voxcpm2_jax import flops
from voxcpm2_jax.chips import CHIPS, LINKS_REACHED, gather_bytes_per_sec
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.run import BackboneRun, BatchConfig
from voxcpm2_jax.plan import roofline
from voxcpm2_jax.plan.machine import Collective, Machine

RUN = BackboneRun(model=MODELS["2b"], batch=BatchConfig(rows=256, slots=4096, patches=2816))
POD = Machine("v5e:16x16", CHIPS["v5e"], 1, (16, 16), 256)


@pytest.mark.parametrize(
    ("kind", "group", "inside", "wire"),
    [
        ("all-gather", 4, 4, (600, 0)),  # three quarters come from others
        ("reduce-scatter", 4, 4, (600, 0)),
        ("all-reduce", 4, 4, (1200, 0)),  # a reduce-scatter and an all-gather
        ("all-reduce", 4, 1, (0, 1200)),
        ("all-gather", 8, 4, (600, 100)),  # the other slice's half, a quarter of it by each of the four
        ("all-to-all", 8, 4, (300, 400)),
        ("collective-permute", 2, 2, (800, 0)),
        ("collective-permute", 2, 1, (0, 800)),
    ],
)
def test_bytes_on_the_wire(kind, group, inside, wire):
    assert Collective(kind, "tslm", False, 1, 800, group, inside).wire_bytes() == pytest.approx(wire)


def test_links_of_a_group():
    link = CHIPS["v5e"].ici_bytes_per_sec
    assert POD.links((16, 16)) == 4 * link and POD.links((1, 16)) == 2 * link
    assert POD.links((1, 4)) == link  # a line: its ends have one link
    assert Machine("v6e:8x8", CHIPS["v6e"], 4, (8, 8), 64).links((8, 8)) == 2 * CHIPS["v6e"].ici_bytes_per_sec  # not closed
    assert Machine("v5p:8x8x8", CHIPS["v5p"], 1, (8, 8, 8), 512).links((1, 8, 8)) == 4 * CHIPS["v5p"].ici_bytes_per_sec
    assert Machine("8xh100", CHIPS["h100"], 1, None, 8).links(None) == 450e9
    assert Machine("v5p:2x4x4", CHIPS["v5p"], 1, (2, 4, 4), 32).links((2, 4, 4)) == 3 * CHIPS["v5p"].ici_bytes_per_sec
    for kind, torus in (("v5e", (16, 16)), ("v6e", (8, 8)), ("v5p", (2, 4, 4)), ("v5p", (8, 8, 8))):
        links = Machine(kind, CHIPS[kind], 1, torus, math.prod(torus)).links(torus)
        assert gather_bytes_per_sec(CHIPS[kind], torus) == LINKS_REACHED * links, "one rule for both"
    assert POD.spans(16) == (1, 16) and POD.spans(64) == (4, 16)


def test_an_all_to_all_goes_through_others():
    """On a ring of 16 half of 8 chips' bytes cross each side of the middle over two links: 2 x a chip's bytes over a link."""
    one = Collective("all-to-all", "rest", False, 1, 16_000_000, 16, 16, (1, 16, 1))
    assert one.seconds(POD)[0] == pytest.approx(2 * 15_000_000 / CHIPS["v5e"].ici_bytes_per_sec)


def test_parameters_are_those_of_the_model(tiny_params):
    leaves = jax.tree_util.tree_leaves_with_path(tiny_params)
    assert flops.num_params(MODELS["tiny"]) == sum(x.size for path, x in leaves if path[-1].key in ("kernel", "embedding"))
    assert flops.num_params(MODELS["2b"]) == pytest.approx(2.29e9, rel=1e-3)  # the release


def test_the_roofline_by_hand():
    """TSLM of the release, 1 row of 4,096 slots on each chip of a v5e pod, full remat, one gather of a layer a pass."""
    mesh = (1, 256, 1)
    layer = 2048 * (16 + 4) * 128 + 16 * 128 * 2048 + 3 * 2048 * 6144
    gather = Collective("all-gather", "tslm", False, 28, 2 * layer, 256, 256, (16, 16), ("data",))
    got = roofline.predict(RUN, RUN.batch, POD, mesh, [gather])
    forward, backward = (p for p in got.passes if p.part == "tslm")
    products, attention = 2 * 28 * 4096 * layer, 4 * 28 * (4096 * 4096 / 2) * 2048
    down = 2 * 28 * 4096 * 2048 * 6144  # is not needed once more
    assert forward.compute == pytest.approx((products + attention) / 197e12)
    assert backward.compute == pytest.approx((3 * products - down + 3.5 * attention) / 197e12)
    assert forward.ici == pytest.approx(28 * 2 * layer * 255 / 256 / 200e9) and forward.dcn == 0
    assert forward.exposed == 0 and forward.bound == forward.compute
    assert got.update_sec == pytest.approx(flops.num_params(MODELS["2b"]) / 256 * 28 / 0.819e12)
    assert got.audio_sec == pytest.approx(256 * 2816 * 0.985 * 0.16)
    assert got.mfu(got.bound_sec) == pytest.approx(got.useful_flops / got.bound_sec / (256 * 197e12))
    assert got.audio_hours_per_day(2.0) == pytest.approx(got.audio_sec / 3600 * 86400 / 2)
    slow = roofline.predict(RUN, RUN.batch, POD, mesh, [gather] * 5)
    assert slow.exposed_sec == pytest.approx(5 * forward.ici - forward.compute)
    assert slow.bound_sec == pytest.approx(got.bound_sec + slow.exposed_sec)
    outside = dataclasses.replace(gather, part="rest", times=10)
    hidden = roofline.predict(RUN, RUN.batch, POD, mesh, [outside])
    assert hidden.exposed_sec == 0 and hidden.bound_sec > got.bound_sec  # beside LocEnc; the bound pays all the same
    locenc = next(p for p in got.passes if p.part == "locenc" and not p.backward).work
    rest = next(p for p in got.passes if p.part == "rest" and not p.backward).work
    shown = roofline.predict(RUN, RUN.batch, POD, mesh, [dataclasses.replace(outside, times=280)])
    assert shown.exposed_sec == pytest.approx(10 * forward.ici - rest - locenc)


def test_calibration_gives_back_what_was_measured():
    """On one H100 with the measured batch, the calibrated figure is the measured one; attention inside clips comes on top."""
    machine = Machine("1xh100", CHIPS["h100"], 1, None, 1)
    batch = BatchConfig(rows=2, slots=4096, patches=2624)
    got = roofline.predict(RUN, batch, machine, (1, 1, 1), [])
    for part, measured in {"tslm": 0.177, "ralm": 0.051, "locdit": 0.240, "locenc": 0.105}.items():
        seconds = sum(p.calibrated for p in got.passes if p.part == part)
        assert measured <= seconds < 1.06 * measured
    assert got.calibrated_update_sec == pytest.approx(0.037)
