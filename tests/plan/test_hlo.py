"""Collectives and out-of-memory messages are read from the compiler's text."""

import types

import numpy as np
import pytest

from voxcpm2_jax.plan import hlo
from voxcpm2_jax.plan.machine import Collective

pytestmark = pytest.mark.fast


def fake_mesh(*shape, torus, slices=1):
    """A mesh over devices with coordinates in the torus and a slice number."""
    per_slice = int(np.prod(torus))
    devices = np.empty(per_slice * slices, object)
    for i in range(len(devices)):
        devices[i] = types.SimpleNamespace(
            coords=tuple(map(int, np.unravel_index(i % per_slice, torus))), slice_index=i // per_slice
        )
    return types.SimpleNamespace(devices=devices.reshape(shape), axis_names=("replica", "data", "tensor"))


# Shortened output of libtpu 0.0.42.1: a scan of 3 inside a scan of 5, and collectives outside of both.
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


def test_collectives_are_multiplied_by_the_trip_counts_of_their_loops():
    found, unknown = hlo.read_collectives(HLO, fake_mesh(2, 4, 1, torus=(2, 4)))
    by_kind = {(one.kind, one.part): one for one in found}
    assert unknown == 0 and len(found) == 5
    weights = 2 * 2048 * 6144
    assert by_kind["all-gather", "tslm"] == Collective("all-gather", "tslm", True, 15, weights, 4, 4, (1, 4), ("data",))
    assert by_kind["reduce-scatter", "tslm"] == Collective("reduce-scatter", "tslm", True, 15, weights, 4, 4, (1, 4), ("data",))
    assert by_kind["all-gather", "locdit"] == Collective("all-gather", "locdit", False, 1, 256, 4, 4, (1, 4), ("data",))
    assert by_kind["all-reduce", "rest"] == Collective("all-reduce", "rest", False, 1, 20, 8, 8, (2, 4), ("replica", "data"))
    assert by_kind["collective-permute", "rest"].whole_bytes == 32 and by_kind["collective-permute", "rest"].group == 2


def test_loops_of_unknown_length_are_counted():
    text = HLO.replace('backend_config={"known_trip_count":{"n":"5"}}', "")
    found, unknown = hlo.read_collectives(text, fake_mesh(2, 4, 1, torus=(2, 4)))
    assert unknown == 1 and {one.times for one in found if one.part == "tslm"} == {3}


def test_sums_between_slices_appear_as_sends_to_the_host():
    text = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %send.1 = (f32[1,4,128]{2,1,0}, u32[], token[]) send(%x, %y), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[1,4,128]{2,1,0}, u32[], token[]) recv(%y), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    (one,), _ = hlo.read_collectives(text, fake_mesh(2, 8, 1, torus=(2, 4), slices=2))
    assert one == Collective("all-reduce", "rest", False, 1, 2048, 2, 1, None, ("replica",))
    assert one.wire_bytes() == (0.0, 2048)  # half of it, twice


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
def test_groups_in_every_notation(text, groups):
    assert hlo._groups(text, fake_mesh(1, 4, 1, torus=(2, 2))) == groups


def test_out_of_memory_messages():
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (789.64G) exceeds "
        "available HBM (15.75G).\nmore"
    )
    found = hlo.parse_exhausted(text)
    assert found["needed_bytes"] == int(789.64 * 2**30) and found["hbm_bytes"] == int(15.75 * 2**30)
    assert found["message"] == text.splitlines()[0]
    found = hlo.parse_exhausted("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 16.52G of 15.75G hbm. Exceeded")
    assert found["needed_bytes"] == int(16.52 * 2**30) and found["hbm_bytes"] == int(15.75 * 2**30)
    assert hlo.parse_exhausted("INTERNAL: something else") is None
