"""`plan`: what the compiler's text says is read right, the arithmetic is what a hand gets, and TPUs are really compiled for."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from voxcpm2_jax import main, plan, roofline
from voxcpm2_jax.chips import CHIPS, LINKS_REACHED, gather_bytes_per_sec
from voxcpm2_jax.config import MODELS, REMAT_POLICIES, BackboneRun, BatchConfig, StageConfig, UserError
from voxcpm2_jax.roofline import Collective, Machine

RUN = BackboneRun(model=MODELS["2b"], batch=BatchConfig(rows=256, slots=4096, patches=2816))
POD = Machine("v5e:16x16", CHIPS["v5e"], 1, (16, 16), 256)


def fake_mesh(*shape, torus, slices=1):
    """A mesh over devices that know their place in the torus and their slice."""
    per_slice = int(np.prod(torus))
    devices = np.empty(per_slice * slices, object)
    for i in range(len(devices)):
        devices[i] = types.SimpleNamespace(
            coords=tuple(map(int, np.unravel_index(i % per_slice, torus))), slice_index=i // per_slice
        )
    return types.SimpleNamespace(devices=devices.reshape(shape), axis_names=("replica", "data", "tensor"))


# ---- what the user writes --------------------------------------------------------------------------------------------


def test_topologies_are_parsed():
    case = plan.parse("4xv6e:8x8,rows=512,mesh=4x64x1,accumulate=2", RUN)
    assert (case.machine.devices, case.machine.slices, case.machine.torus) == (256, 4, (8, 8))
    assert case.mesh == (4, 64, 1) and case.config.accumulate == 2 and case.config.batch.rows == 512
    case = plan.parse("v5p:8x8x8", RUN)
    assert case.machine.devices == 512 and case.machine.chip.name == "v5p" and case.config == RUN
    case = plan.parse("64xh100", RUN)
    assert (case.machine.devices, case.machine.slices, case.machine.torus) == (64, 8, None)


def test_rows_scale_the_stages_too():
    stages = (StageConfig(), StageConfig(first_step=5, batch=BatchConfig(rows=128, slots=8192, patches=5632)))
    run = plan.parse("v5e:16x16,rows=512", BackboneRun(model=MODELS["2b"], batch=RUN.batch, stages=stages)).config
    assert run.batch.rows == 512 and run.stages[1].batch.rows == 256 and run.stages[1].batch.slots == 8192
    with pytest.raises(UserError, match="128 rows where the run has 256"):
        plan.with_rows(BackboneRun(model=MODELS["2b"], batch=RUN.batch, stages=stages), 1)


def test_the_largest_of_a_ramp_stands_for_it():
    sizes = ((0, 64, 4096), (5, 256, 4096), (9, 128, 8192))
    stages = tuple(StageConfig(first_step=s, batch=BatchConfig(rows=b, slots=t, patches=t // 2)) for s, b, t in sizes)
    run = BackboneRun(model=MODELS["2b"], batch=RUN.batch, stages=stages)
    assert [batch.rows for batch in plan.parse("64xh100", run).batches] == [256, 128]
    assert [batch.rows for batch in plan.parse("128xh100", run).batches] == [64, 256, 128]  # 64 rows on 128 GPUs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e:3x5", "no such TPU; TPU slices as .*v5e:1x1, 2x2, .* 16x16; .*COUNTxKIND with gb200, b200"),
        ("v9:2x2", "no such TPU"),
        ("v5litepod-8", "expected TPU slices as"),
        ("8xrtx9090", "expected TPU slices as"),
        ("0xh100", "expected TPU slices as"),
        ("12xh100", "12 GPUs are no whole number of machines of 8"),
        ("8xh100,rows=0", "rows=0: expected at least 1"),
        ("v5e:2x4,slots=3", "'slots=3' is none of rows=N"),
        ("v5e:2x4,rows=many", "expected a whole number, got 'many'"),
        ("v5e:2x4,mesh=2x4", "'mesh=2x4' is none of"),
    ],
)
def test_wrong_topologies_are_refused(text, message, capsys):
    assert main.main(["plan", "--config=configs/backbone.py:tiny", f"--topology={text}"]) == main.MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises(UserError, match=message):
        plan.parse(text, RUN)


# ---- what the compiler writes ----------------------------------------------------------------------------------------

# Shortened from what libtpu 0.0.42.1 writes: a scan of 3 inside one of 5, and things outside of both.
HLO = """HloModule jit_train_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%inner_cond (p: (s32[], f32[8])) -> pred[] {
  %c3 = s32[]{:T(128)} constant(3)
  %p = (s32[]{:T(128)}, f32[8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %c3), direction=LT
}

%all-reduce-scatter.7.clone (input: bf16[2048,6144]) -> bf16[512,6144] {
  %input = bf16[2048,6144]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[2048,6144]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[512,6144]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={512,6144}
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]) parameter(0)
  %w = bf16[1,512,6144]{2,1,0:T(8,128)(2,1)} fusion(%p), kind=kLoop, calls=%add
  %all-gather.3 = bf16[1,2048,6144]{2,1,0:T(8,128)(2,1)} all-gather(%w), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}
  %grad = bf16[2048,6144]{1,0} fusion(%p), kind=kOutput, calls=%add
  %rs = bf16[512,6144]{1,0} fusion(%grad), kind=kCustom, calls=%all-reduce-scatter.7.clone
  ROOT %t = (s32[], f32[8]) tuple(%p)
}

%outer_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]) parameter(0)
  ROOT %while.2 = (s32[], f32[8]) while(%p), condition=%inner_cond, body=%inner_body, \
metadata={op_name="jit(step)/while/body/transpose(jvp(VoxCPM2.read_batch))/tslm/base_lm/while"}
}

%outer_cond (p: (s32[], f32[8])) -> pred[] {
  ROOT %never = pred[] custom-call(%p), custom_call_target="x"
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %while.1 = (s32[], f32[8]) while(%a), condition=%outer_cond, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %start = (f32[16]{0}, f32[64]{0}) all-gather-start(%a), replica_groups=[2,4]<=[2,4], \
metadata={op_name="jit(step)/jvp()/locdit/feat_decoder/out_proj/dot"}
  %done = f32[64]{0} all-gather-done(%start)
  %permute = f32[4,2]{0,1:T(2,128)} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
  ROOT %all-reduce.9 = (f32[2]{0}, /*index=1*/f32[3]{0}) all-reduce(%a, %a), replica_groups={}, to_apply=%add
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    found, unknown = plan.read_collectives(HLO, fake_mesh(2, 4, 1, torus=(2, 4)))
    by_kind = {(one.kind, one.part): one for one in found}
    assert unknown == 0 and len(found) == 5
    weights = 2 * 2048 * 6144
    assert by_kind["all-gather", "tslm"] == Collective("all-gather", "tslm", True, 15, weights, 4, 4, (1, 4), ("data",))
    assert by_kind["reduce-scatter", "tslm"] == Collective("reduce-scatter", "tslm", True, 15, weights, 4, 4, (1, 4), ("data",))
    assert by_kind["all-gather", "locdit"] == Collective("all-gather", "locdit", False, 1, 256, 4, 4, (1, 4), ("data",))
    assert by_kind["all-reduce", "rest"] == Collective("all-reduce", "rest", False, 1, 20, 8, 8, (2, 4), ("replica", "data"))
    assert by_kind["collective-permute", "rest"].whole_bytes == 32 and by_kind["collective-permute", "rest"].group == 2


def test_loops_without_a_length_are_told():
    text = HLO.replace('backend_config={"known_trip_count":{"n":"5"}}', "")
    found, unknown = plan.read_collectives(text, fake_mesh(2, 4, 1, torus=(2, 4)))
    assert unknown == 1 and {one.times for one in found if one.part == "tslm"} == {3}


def test_sums_between_slices_are_sends_to_the_host():
    text = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %send.1 = (f32[1,4,128]{2,1,0}, u32[], token[]) send(%x, %y), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[1,4,128]{2,1,0}, u32[], token[]) recv(%y), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    (one,), _ = plan.read_collectives(text, fake_mesh(2, 8, 1, torus=(2, 4), slices=2))
    assert one == Collective("all-reduce", "rest", False, 1, 2048, 2, 1, None, ("replica",))
    assert one.wire_bytes() == (0.0, 2048)  # half of it twice


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}, x", [[0, 3], [1, 2]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,2}}, x", [[0, 1], [1, 2]]),
    ],
)
def test_groups_in_every_form(text, groups):
    assert plan._groups(text, fake_mesh(1, 4, 1, torus=(2, 2))) == groups


def test_words_about_memory():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (789.64G) exceeds "
        "available HBM (15.75G).\nmore"
    )
    found = plan.parse_exhausted(text)
    assert found["needed_bytes"] == int(789.64 * 2**30) and found["hbm_bytes"] == int(15.75 * 2**30)
    assert found["message"] == text.splitlines()[0]
    found = plan.parse_exhausted("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 16.52G of 15.75G hbm. Exceeded")
    assert found["needed_bytes"] == int(16.52 * 2**30) and found["hbm_bytes"] == int(15.75 * 2**30)
    assert plan.parse_exhausted("INTERNAL: something else") is None


# ---- arithmetic ------------------------------------------------------------------------------------------------------


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
    assert roofline.num_params(MODELS["tiny"]) == sum(x.size for path, x in leaves if path[-1].key in ("kernel", "embedding"))
    assert roofline.num_params(MODELS["2b"]) == pytest.approx(2.29e9, rel=1e-3)  # the release


def test_the_roofline_by_hand():
    """TSLM of the release, 1 row of 4,096 slots on each chip of a v5e pod, full remat, one gather of a layer a pass."""
    mesh = (1, 256, 1)
    layer = 2048 * (16 + 4) * 128 + 16 * 128 * 2048 + 3 * 2048 * 6144
    gather = Collective("all-gather", "tslm", False, 28, 2 * layer, 256, 256, (16, 16), ("data",))
    got = roofline.predict(RUN, RUN.batch, POD, mesh, [gather])
    forward, backward = (p for p in got.passes if p.part == "tslm")
    products, attention = 2 * 28 * 4096 * layer, 4 * 28 * (4096 * 4096 / 2) * 2048
    assert forward.compute == pytest.approx((products + attention) / 197e12)
    assert backward.compute == pytest.approx((3 * products + 3.5 * attention) / 197e12)
    assert forward.ici == pytest.approx(28 * 2 * layer * 255 / 256 / 200e9) and forward.dcn == 0
    assert forward.exposed == 0 and forward.bound == forward.compute
    assert got.update_sec == pytest.approx(roofline.num_params(MODELS["2b"]) / 256 * 28 / 0.819e12)
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


def test_the_table_of_remat_is_the_config_s():
    assert list(roofline.REMATS) == list(REMAT_POLICIES)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(capsys, *argv):
    status = main.main(["plan", *argv])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]), err


def test_gpus_are_predicted(capsys, tmp_path):
    status, got, err = command(
        capsys, "--config=configs/backbone.py:2b", "--topology=64xh100", f"--output={tmp_path}/plan.json"
    )
    whole = json.loads((tmp_path / "plan.json").read_text())
    assert status == main.DONE and got["ok"] and whole["plans"][0]["passes"] and "64xh100" in err
    first = got["plans"][0]
    assert not first["compiled"] and first["fits"] and 0 < first["calibrated"]["mfu"] < first["bound"]["mfu"] < 1


def test_gpus_that_are_too_small_get_a_way_out(capsys):
    status, got, err = command(capsys, "--config=configs/backbone.py:2b", "--topology=8xa100")
    assert status == main.NO and not got["ok"] and not got["plans"][0]["fits"]
    suggestion = got["plans"][0]["suggestion"]
    assert suggestion["topology"].startswith("8xa100,") and all(entry["fits"] for entry in suggestion["plans"])
    assert f"this fits: --topology={suggestion['topology']}" in err
    status, again, _ = command(capsys, "--config=configs/backbone.py:2b", f"--topology={suggestion['topology']}")
    assert status == main.DONE and again["plans"][0]["peak_bytes"] == suggestion["plans"][0]["peak_bytes"]


def test_a_search_shows_what_is_not_beaten(capsys):
    _, got, err = command(capsys, "--config=configs/backbone.py:2b", "--topology=64xh100", "--search")
    (found,) = got["searches"]
    front = [(e["calibrated"]["audio_hours_per_day"], e["peak_bytes"]) for e in found["front"]]
    assert len(front) >= 2 and "fastest for the memory it leaves free" in err
    assert front == sorted(front, reverse=True) and [m for _, m in front] == sorted((m for _, m in front), reverse=True)


def test_without_libtpu_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'libtpu' else find(name, package)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(pathlib.Path(plan.__file__).parents[1])])}
    argv = [sys.executable, "-m", "voxcpm2_jax", "plan", "--config=configs/backbone.py:tiny", "--topology=v5e:2x4"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (main.MISTAKE, "", f"error: {plan.NO_LIBTPU}\n")


def test_a_libtpu_that_cannot_be_loaded_is_told(monkeypatch, tmp_path, capsys):
    (tmp_path / "libtpu.py").write_text("raise ImportError('blocked')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)  # importing jax sets it
    assert main.main(["plan", "--config=configs/backbone.py:tiny", "--topology=v5e:2x4"]) == main.MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and "error: v5e:2x4: libtpu cannot be loaded" in err and "Traceback" not in err


def test_a_way_out_is_compiled_until_one_fits(capsys, monkeypatch):
    """With a compiler that needs half as much again as the estimate; the real one's words are tested below."""
    asked = []

    def compile_for(case, batch):
        needed = round(1.5 * sum(roofline.memory(case.config, batch, case.mesh).values()))
        asked.append((case.config.batch.rows, case.config.remat, case.config.accumulate, batch.slots, needed))
        if needed > 15.75 * 2**30:
            return {
                "fits": False,
                "compile_sec": 1.0,
                "needed_bytes": needed,
                "hbm_bytes": round(15.75 * 2**30),
                "message": "no",
            }
        memory = dict.fromkeys(("outputs", "aliased", "temporaries", "code"), 0) | {"arguments": needed}
        return {"fits": True, "compile_sec": 1.0, "memory": memory, "unknown_loops": 0, "collectives": []}

    monkeypatch.setattr(plan, "compile_for", compile_for)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: name)
    status, got, err = command(capsys, "--config=configs/backbone.py:2b", "--topology=v5e:16x16,rows=1024,remat=none")
    assert status == main.NO and not got["ok"]
    failed = [entry for entry in got["plans"] if not entry["fits"]]
    assert failed and "the compiler needs" in failed[0]["problem"] and failed[0]["peak_bytes"] > failed[0]["hbm_bytes"]
    suggestion = failed[0]["suggestion"]
    assert all(entry["fits"] and entry["rows"] in (1024, 2048) for entry in suggestion["plans"])  # the batch stays what it was
    assert asked[-1][-1] < 15.75 * 2**30 and f"this fits: --topology={suggestion['topology']}" in err


@pytest.fixture(scope="module")
def compiled():
    """The tiny run compiled for v5e:2x4 as it is, and with so many rows that no chip holds them."""
    run = main.from_dict(BackboneRun, main.load_config("configs/backbone.py:tiny"))
    cases = [plan.parse(text, run) for text in ("v5e:2x4", "v5e:2x4,rows=16384")]
    return [plan._entry(case, case.config.batch) for case in cases]


def test_the_train_step_compiles_for_tpu_with_these_collectives(compiled, tiny_params):
    entry = compiled[0]
    assert entry["compiled"] and entry["fits"] and entry["unknown_loops"] == 0 and entry["mesh"] == [1, 8, 1]
    assert 0 < entry["peak_bytes"] < 2**30
    params = sum(x.size for x in jax.tree.leaves(tiny_params))
    assert params * 4 / 8 <= entry["memory"]["parameters"] < 1.2 * params * 4 / 8  # split over eight, norms copied
    # FSDP gathers each of a layer's seven matrices once for the forward pass and once for the backward pass.
    tslm = {p["pass"]: p["collectives"] for p in entry["passes"] if p["part"] == "tslm"}
    layers = MODELS["tiny"].tslm.num_layers
    matrices = 4 * layers * (32 * 8 * 4 + 2 * 32 * 8 * 2 + 4 * 8 * 32 + 3 * 32 * 64)
    for name in ("forward", "backward"):
        assert tslm[name]["all-gather"]["bytes"] == matrices
        assert 4 * layers <= tslm[name]["all-gather"]["times"] <= 7 * layers  # the compiler may join small ones
    assert set(tslm["forward"]) == {"all-gather"}
    gradients = [tslm["backward"].get(kind, {"bytes": 0})["bytes"] for kind in ("all-reduce", "reduce-scatter")]
    assert matrices <= sum(gradients) < 1.05 * matrices  # of the matrices, and of the norms
    # Nothing gathers a whole batch, nor a whole stack of layers.
    assert all(t["bytes"] / t["times"] < 2**18 for t in entry["collectives"].values())


def test_what_does_not_fit_is_told_in_the_compiler_s_words(compiled):
    entry = compiled[1]
    assert not entry["fits"] and not entry["compiled"] and "RESOURCE_EXHAUSTED" in entry["compiler"]
    assert entry["peak_bytes"] > entry["hbm_bytes"] == int(15.75 * 2**30) and "of 15.75 GiB" in entry["problem"]
