"""The arithmetic of `plan` against calculations by hand, and its calibration against the measured seconds."""

import dataclasses
import math

import jax
import pytest

from voxcpm2_jax import flops
from voxcpm2_jax.chips import CHIPS, LINKS_REACHED, gather_bytes_per_sec
from voxcpm2_jax.config.model import MODELS
from voxcpm2_jax.config.run import SPEECH_BATCH, BackboneRun, BatchConfig
from voxcpm2_jax.plan import roofline
from voxcpm2_jax.plan.machine import Collective, Machine

pytestmark = pytest.mark.fast

RUN = BackboneRun(model=MODELS["2b"], batch=dataclasses.replace(SPEECH_BATCH, rows=256))
POD = Machine("v5e:16x16", CHIPS["v5e"], 1, (16, 16), 256)


@pytest.mark.parametrize(
    ("kind", "group", "inside", "expected"),
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
def test_bytes_that_a_device_takes_in(kind, group, inside, expected):
    assert Collective(kind, "tslm", False, 1, 800, group, inside).wire_bytes() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "torus", "group", "links"),
    [
        ("v5e", (16, 16), (16, 16), 4),
        ("v5e", (16, 16), (1, 16), 2),
        ("v5e", (16, 16), (4, 16), 3),
        ("v5e", (16, 16), (1, 4), 1),  # a line: its end has one neighbour
        ("v5e", (16, 16), (1, 1), 1),
        ("v6e", (8, 8), (8, 8), 2),  # does not wrap around
        ("v5p", (8, 8, 8), (8, 8, 8), 6),
        ("v5p", (8, 8, 8), (1, 8, 8), 4),
        ("v5p", (2, 4, 4), (2, 4, 4), 3),
    ],
)
def test_links_of_a_group(kind, torus, group, links):
    chip = CHIPS[kind]
    machine = Machine(kind, chip, 1, torus, math.prod(torus))
    assert machine.ici_bytes_per_sec(group) == links * chip.ici_bytes_per_sec
    assert gather_bytes_per_sec(chip, group, torus) == pytest.approx(LINKS_REACHED * links * chip.ici_bytes_per_sec)


def test_links_of_gpus():
    assert Machine("8xh100", CHIPS["h100"], 1, None, 8).ici_bytes_per_sec(None) == 450e9
    assert gather_bytes_per_sec(CHIPS["h100"], (8,)) == LINKS_REACHED * 450e9
    assert gather_bytes_per_sec(CHIPS["h100"], (64,)) == LINKS_REACHED * 8 * 50e9
    assert gather_bytes_per_sec(CHIPS["l4"], (16,)) == LINKS_REACHED * 32e9  # no network in the table: the rate of a link


def test_devices_stand_side_by_side():
    assert POD.spans(16) == (1, 16) and POD.spans(64) == (4, 16)


def test_positions_that_hide_the_gathers():
    needed, present = roofline.positions_for_gathers(RUN, RUN.batch, POD, (4, 64, 1))
    assert (round(needed), present) == (round(197e12 / (0.9 * 3 * 50e9)), 4096)  # 4 x 16 chips have three links
    halved = dataclasses.replace(RUN, accumulate=2)
    assert roofline.positions_for_gathers(halved, RUN.batch, POD, (2, 64, 2)) == (
        pytest.approx(197e12 / (0.9 * 3 * 50e9)),
        4096,
    )
    gpus = Machine("64xh100", CHIPS["h100"], 8, None, 8)
    assert round(roofline.positions_for_gathers(RUN, RUN.batch, gpus, (1, 64, 1))[0]) == 2748
    assert roofline.positions_for_gathers(RUN, RUN.batch, POD, (256, 1, 1)) is None


def test_an_all_to_all_passes_through_other_chips():
    """On a ring of 16, half the bytes of 8 chips cross the middle over two links: twice a chip's bytes on one link."""
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
    down = 2 * 28 * 4096 * 2048 * 6144  # is not recomputed
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
    assert hidden.exposed_sec == 0 and hidden.bound_sec > got.bound_sec  # behind LocEnc; the bound still counts it
    locenc = next(p for p in got.passes if p.part == "locenc" and not p.backward).work
    rest = next(p for p in got.passes if p.part == "rest" and not p.backward).work
    shown = roofline.predict(RUN, RUN.batch, POD, mesh, [dataclasses.replace(outside, times=280)])
    assert shown.exposed_sec == pytest.approx(10 * forward.ici - rest - locenc)


def test_products_in_8_bits_take_half_the_time():
    """All but the gradients of weights: 1 of 1 forward, 2 of 3 less `down` backward with full remat. Gathers halve."""
    layer = 2048 * (16 + 4) * 128 + 16 * 128 * 2048 + 3 * 2048 * 6144
    product, down = 2 * 28 * 4096 * layer / 197e12, 2 * 28 * 4096 * 2048 * 6144 / 197e12
    got = {}
    for products in (None, "int8"):
        run = dataclasses.replace(RUN, products=products)
        passes = roofline.predict(run, RUN.batch, POD, (1, 256, 1), []).passes
        forward, backward = (p.compute for p in passes if p.part == "tslm")
        gathers = {one.kind: one.whole_bytes for one in roofline.layer_collectives(run, RUN.batch, POD, (1, 256, 1))}
        got[products] = forward, backward, gathers["all-gather"], gathers["all-reduce"]
    (forward, backward, gathered, summed), (forward_8, backward_8, gathered_8, summed_8) = got.values()
    assert forward - forward_8 == pytest.approx(product / 2)
    assert backward - backward_8 == pytest.approx((2 * product - down) / 2)
    assert gathered == 2 * gathered_8 and summed == summed_8


def test_calibration_reproduces_the_measurement():
    """On one H100 with the measured batch the rule of thumb gives the measured seconds, plus attention within clips."""
    machine = Machine("1xh100", CHIPS["h100"], 1, None, 1)
    batch = BatchConfig(rows=2, slots=4096, patches=2624)
    got = roofline.predict(RUN, batch, machine, (1, 1, 1), [])
    for part, measured in {"tslm": 0.177, "ralm": 0.051, "locdit": 0.240, "locenc": 0.105}.items():
        seconds = sum(p.rule_of_thumb for p in got.passes if p.part == part)
        assert measured <= seconds < 1.06 * measured
    assert got.thumb_update_sec == pytest.approx(0.037)
