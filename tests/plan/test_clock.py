"""The compiler's clock, read from a program written by hand: loops, kernels, transfers beside work, and lines of code."""

import json
import pathlib

import jax
import numpy as np
import pytest

from voxcpm2_jax.chips import CHIPS
from voxcpm2_jax.cli import main, outcome
from voxcpm2_jax.plan import clock
from voxcpm2_jax.plan.machine import Machine

V5E = Machine("v5e:2x2", CHIPS["v5e"], 1, (2, 2), 4)
LAYER = 'op_name="jit(f)/jvp(M)/tslm/base_lm/while/body/layers/mlp/down/dot" stack_frame_id=2'
BACK = 'op_name="jit(f)/transpose(jvp(M))/tslm/base_lm/while/body/checkpoint/rematted_computation/layers/mlp/dot"'
PROGRAM = f"""HloModule jit_f, is_scheduled=true

FileNames
1 "/somewhere/models/transformer.py"

FunctionNames
1 "run"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}}
2 {{file_name_id=1 function_name_id=1 line=42 end_line=42 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}

%fused (p: bf16[8]) -> bf16[8] {{
  ROOT %add.1 = bf16[8] add(%p, %p), backend_config={{"estimated_cycles":"999"}}
}}

%gather (p: bf16[512,1024]) -> bf16[2048,1024] {{
  ROOT %all-gather.9 = bf16[2048,1024] all-gather(%p), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
}}

%async_collective_fusion.1 (p: bf16[512,1024]) -> bf16[2048,1024] {{
  ROOT %all-gather.8 = bf16[2048,1024] all-gather(%p), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
}}

%body (s: (s32[], bf16[512,1024])) -> (s32[], bf16[512,1024]) {{
  %w = bf16[512,1024] get-tuple-element(%s), index=1
  %async-collective-start.1 = bf16[2048,1024] fusion(%w), kind=kCustom, calls=%gather
  %product.1 = bf16[8] fusion(%w), calls=%async_collective_fusion.1, metadata={{{LAYER}}}, {{"estimated_cycles":"CYCLES"}}
  %async-collective-done.1 = bf16[2048,1024] fusion(%async-collective-start.1), kind=kCustom, calls=%gather
  %again.1 = bf16[8] fusion(%w), calls=%fused, metadata={{{BACK}}}, backend_config={{"estimated_cycles":"500"}}
}}

%condition (s: (s32[], bf16[512,1024])) -> pred[] {{
  %n = s32[] constant(3)
}}

ENTRY %main (a: bf16[8]) -> bf16[8] {{
  %a = bf16[8192,128] parameter(0)
  %attention.1 = bf16[8192,128] custom-call(%a), custom_call_target="tpu_custom_call"
  %mark.1 = bf16[8] custom-call(%a), custom_call_target="AllocateBuffer"
  %loop.1 = (s32[], bf16[512,1024]) while(%t), condition=%condition, body=%body, {{"known_trip_count":{{"n":"3"}}}}
  %copy.1 = bf16[819,1000] copy(%a)
}}
"""
GATHER_CYCLES = 2048 * 1024 * 2 * 3 / 4 / (0.9 * 2 * 50e9) * CHIPS["v5e"].clock_hz  # two neighbours, links at 90 %


class Device:
    def __init__(self, number):
        self.coords = (number // 2, number % 2, 0)


class FakeMesh:
    devices = np.array([Device(i) for i in range(4)], object).reshape(1, 4, 1)
    axis_names = ("replica", "data", "tensor")


def found(program, kernels):
    ticks = clock.read(program, V5E, FakeMesh(), kernels)
    return ticks, {(line.kind, line.run): line for line in ticks.lines}


def test_loops_kernels_and_lines_of_code():
    ticks, lines = found(PROGRAM.replace("CYCLES", "1000000"), {"attention.1": 5000.0})
    product = lines["fusion", "forward"]
    assert (product.part, product.cycles, product.times, product.place) == ("tslm", 3e6, 3, "transformer.py:42")
    assert product.scope == "mlp/down"
    assert lines["fusion", "recompute"].cycles == 1500 and lines["fusion", "recompute"].times == 3
    assert lines["kernel attention", "update"].cycles == pytest.approx(2 * 8192 * 128 * 2 / 819e9 * ticks.chip.clock_hz)
    assert lines["copy", "update"].cycles == pytest.approx((819_000 + 8192 * 128) * 2 / 819e9 * ticks.chip.clock_hz)
    assert found(PROGRAM.replace("CYCLES", "1"), {"attention.1": 5e6})[1]["kernel attention", "update"].cycles == 5e6
    again = PROGRAM.replace(
        "  %mark.1 =", '  %attention.2 = bf16[8192,128] custom-call(%a), custom_call_target="tpu_custom_call"\n  %mark.1 ='
    )
    twice = found(again, {"attention.2": 5e6})[1]["kernel attention", "update"]
    assert (twice.cycles, twice.times) == (1e7, 2), "the compiler has the schedule of only one of two equal kernels"
    assert ticks.seconds == pytest.approx(sum(ticks.seconds_by("part").values()))
    assert ticks.dearest(1)[0]["place"] == "transformer.py:42"


def test_a_transfer_counts_as_far_as_the_program_waits_for_it():
    for cycles, wait in ((1_000_000, 0.0), (10_000, GATHER_CYCLES - 10_000)):
        ticks, _ = found(PROGRAM.replace("CYCLES", str(cycles)), {})
        waits = [line.cycles for line in ticks.lines if line.kind == "wait for all-gather"]
        assert waits == pytest.approx([3 * wait]) and ticks.hidden_cycles == pytest.approx(3 * (GATHER_CYCLES - wait))


def test_a_transfer_between_slices_runs_beside_work_until_it_is_received():
    """Two slices of two chips; half of 4 MB crosses the network twice."""
    text = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %send.1 = (f32[1000,1000], u32[], token[]) send(%x), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[1000,1000], u32[], token[]) recv(%y), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %work.1 = bf16[8] fusion(%w), calls=%fused, backend_config={"estimated_cycles":"100000"}
  %recv-done.1 = (f32[1000,1000], token[]) recv-done(%recv.1)
}
"""
    mesh = FakeMesh()
    for device in mesh.devices.flat:
        device.slice_index = device.coords[0]
    slices = Machine("2xv5e:1x2", CHIPS["v5e"], 2, (1, 2), 2)
    ticks = clock.read(text, slices, mesh)
    network = 4_000_000 / (0.9 * 3.125e9) * CHIPS["v5e"].clock_hz
    waits = {line.kind: line.cycles for line in ticks.lines}
    assert waits["wait for other slices"] == pytest.approx(network - 100_000)
    assert ticks.hidden_cycles == pytest.approx(100_000)


def test_kernels_are_timed_by_their_schedule(tmp_path):
    text = """= control target key start
LB: loop body
     0   :  { %a = vld }
   0x1 LB: > { %b = vld }
base_bounds: (1, 2)
iteration_bounds: (2, 8)
   0x2   : > { %c = vmul }
   0x3   : > { %d = scmp.ge 18 /* loop exit test */ }
   0x4   :  { %e = vst }
"""
    (tmp_path / "123-splash_fwd.1-01-final_bundles.txt").write_text(text)
    (tmp_path / "123-splash_fwd.1-00-schedule-analysis_final_bundles.txt").write_text("total scheduled bundles: 5")
    assert clock.kernels_in(pathlib.Path(tmp_path)) == {"splash_fwd.1": 1 + 3 * 16}
    assert clock.kernels_in(pathlib.Path(tmp_path), {"splash": 0.5}) == {"splash_fwd.1": 1 + 3 * 8}


def test_a_program_for_another_platform_is_refused():
    text = jax.jit(lambda x: x + 1).lower(1.0).compile().as_text()
    with pytest.raises(ValueError, match="no estimated cycles"):
        clock.read(text, V5E)


def test_clock_rates_follow_from_the_peak():
    assert {name: round(CHIPS[name].clock_hz / 1e9, 2) for name in ("v4", "v5e", "v5p", "v6e")} == {
        "v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75
    }  # fmt: skip


# ---- bench clock -----------------------------------------------------------------------------------------------------

BENCH = ["bench", "clock", "--config=configs/backbone.py:tiny", "--config.model.dtype=bfloat16", "--chip=v5e"]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--part=locdit", "--rows=0"], "--rows=0: expected at least 1"),
        (["--part=locdit", "--option=fast"], "--option=fast: expected NAME=VALUE, or none"),
        (["--part=locdit", "--against=no-such-commit"], "--against=no-such-commit: git says: fatal"),
        (["--part=vae"], "invalid choice: 'vae'"),
    ],
)
def test_wrong_arguments_are_one_line(more, problem, capsys):
    assert main.main([*BENCH, *more]) == outcome.MISTAKE
    out, err = capsys.readouterr()
    assert out == "" and problem in err.splitlines()[-1]


def test_a_stack_is_timed_before_and_after(capsys):
    assert main.main([*BENCH, "--part=locenc", "--against=HEAD", "--option=none"]) == outcome.DONE
    out, err = capsys.readouterr()
    got = json.loads(out.splitlines()[-1])
    assert [one["name"] for one in got["versions"]] == ["this", "HEAD"] and got["options"] == {}
    for one in got["versions"]:
        assert 0 < one["sec"] < 1 and 0 < one["mfu"] < 1 and min(one["passes"][run] for run in ("forward", "backward")) > 0
    assert "the dearest lines" in err
