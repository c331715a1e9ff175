"""Layouts slot by slot, and packing: every clip can be read back from its row."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxcpm2_jax.sequence import Batch, lay_out, lay_out_prompt_clip, pack

pytestmark = pytest.mark.fast

P, C = 2, 3


def audio(n, start=0):
    """n patches, each filled with its own number."""
    return np.broadcast_to(np.arange(start, start + n, dtype=np.float32)[:, None, None] + 1, (n, P, C))


TEXT = np.array([201, 202, 203])
A = "audio"  # a slot that holds a patch


def slots(sequence):
    """Token id, or (A, number of the patch), of every slot."""
    found = [int(t) for t in sequence.tokens_T]
    for patch_PC, slot in zip(sequence.patches_MPC, sequence.slot_M, strict=True):
        assert found[slot] == 0 and (patch_PC == patch_PC[0, 0]).all()
        found[slot] = (A, int(patch_PC[0, 0]))
    return found


REFERENCE = [103, (A, 11), (A, 12), 104]


@pytest.mark.parametrize(
    ("given_audio", "expected", "num_targets"),
    [
        ({"target_MPC": audio(2)}, [*TEXT, 101, (A, 1), (A, 2), 102], 2),
        ({"reference_MPC": audio(2, 10), "target_MPC": audio(2)}, [*REFERENCE, *TEXT, 101, (A, 1), (A, 2), 102], 2),
        # what generation starts from: it ends where the first patch is drawn
        ({}, [*TEXT, 101], 0),
        ({"reference_MPC": audio(2, 10)}, [*REFERENCE, *TEXT, 101], 0),
        ({"prompt_MPC": audio(3, 20)}, [*TEXT, 101, (A, 21), (A, 22), (A, 23)], 0),
        ({"reference_MPC": audio(2, 10), "prompt_MPC": audio(1, 20)}, [*REFERENCE, *TEXT, 101, (A, 21)], 0),
        # a continuation to learn from: prompt and target stand side by side, only the target bears loss
        ({"prompt_MPC": audio(1, 20), "target_MPC": audio(2)}, [*TEXT, 101, (A, 21), (A, 1), (A, 2), 102], 2),
    ],
    ids=["zero-shot", "reference", "text", "text-reference", "continuation", "reference-continuation", "learn-continuation"],
)
def test_layout_slot_by_slot(given_audio, expected, num_targets):
    sequence = lay_out(TEXT, **given_audio)
    assert slots(sequence) == expected
    assert (sequence.num_slots, sequence.num_targets) == (len(expected), num_targets)
    assert sequence.num_patches == sum(isinstance(slot, tuple) for slot in expected)
    is_target = [patch_PC[0, 0] <= 10 for patch_PC in sequence.patches_MPC]
    assert sequence.target_M.tolist() == is_target
    assert sequence.tokens_T.dtype == sequence.slot_M.dtype == np.int32


def test_layout_of_a_clip_to_listen_to():
    sequence = lay_out_prompt_clip(TEXT, audio(2))
    assert slots(sequence) == [*TEXT, 103, (A, 1), (A, 2), 104]
    assert sequence.num_targets == 0 and sequence.stop_M.tolist() == [0, 0]


def test_trap_7_the_stop_label_sits_on_the_last_target_patch():
    sequence = lay_out(TEXT, reference_MPC=audio(2), target_MPC=audio(3))
    assert sequence.stop_M.tolist() == [0, 0, 0, 0, 1]
    assert lay_out(TEXT, target_MPC=audio(1)).stop_M.tolist() == [1]
    assert lay_out(TEXT, prompt_MPC=audio(2)).stop_M.tolist() == [0, 0]
    batch = pack(
        [[lay_out(TEXT, reference_MPC=audio(2), target_MPC=audio(3))]], num_slots=12, num_patches=6, patch_shape=(P, C)
    )
    assert batch.stop_BM[0].tolist() == [0, 0, 1, 0, 0, 0]


def test_an_empty_text_has_its_marks_alone():
    assert slots(lay_out([], target_MPC=audio(1))) == [101, (A, 1), 102]


def test_packed_row_number_by_number():
    first = lay_out([201], reference_MPC=audio(1, 10), target_MPC=audio(2))
    second = lay_out([202, 203], target_MPC=audio(1, 2))
    batch = pack([[first, second], []], num_slots=16, num_patches=6, patch_shape=(P, C))
    # slots: 103 a 104 201 101 a a 102 | 202 203 101 a 102 | padding
    assert batch.tokens_BT[0].tolist() == [103, 0, 104, 201, 101, 0, 0, 102, 202, 203, 101, 0, 102, 0, 0, 0]
    assert batch.segment_BT[0].tolist() == [1] * 8 + [2] * 5 + [0] * 3
    assert batch.position_BT[0].tolist() == [*range(8), *range(5), 0, 0, 0]
    assert batch.slot_BM[0].tolist() == [5, 6, 11, 1, -1, -1]
    assert batch.target_BM[0].tolist() == [True] * 3 + [False] * 3
    assert batch.stop_BM[0].tolist() == [0, 1, 1, 0, 0, 0]
    assert batch.patches_BMPC[0, :, 0, 0].tolist() == [1, 2, 3, 11, 0, 0]
    assert (batch.slot_BM[1] == -1).all() and not batch.segment_BT[1].any() and not batch.target_BM[1].any()


@pytest.mark.parametrize(("num_slots", "num_patches"), [(6, 8), (8, 1)])
def test_what_does_not_fit_is_a_fault_of_the_caller(num_slots, num_patches):
    with pytest.raises(AssertionError, match="do not fit"):
        pack([[lay_out(TEXT, target_MPC=audio(3))]], num_slots=num_slots, num_patches=num_patches, patch_shape=(P, C))


def test_batch_is_a_tree():
    batch = pack([[lay_out(TEXT, target_MPC=audio(2))]], num_slots=8, num_patches=4, patch_shape=(P, C))
    doubled = jax.tree.map(lambda x: np.concatenate([x, x]), batch)
    assert isinstance(doubled, Batch) and doubled.tokens_BT.shape == (2, 8)
    assert len(jax.tree.leaves(batch)) == 7


# ---- packing, then reading back --------------------------------------------------------------------------------------

clips = st.tuples(
    st.lists(st.integers(110, 400), max_size=5),  # text
    st.integers(1, 4),  # patches
    st.integers(0, 3),  # of the reference clip
    st.integers(0, 2),  # of the prompt
    st.sampled_from(["learn", "speak", "listen"]),
)


def sequence_of(clip, seed):
    text, num_patches, num_reference, num_prompt, kind = clip
    rng = np.random.default_rng(seed)
    target, reference, prompt = (
        rng.normal(size=(n, P, C)).astype(np.float32) if n else None for n in (num_patches, num_reference, num_prompt)
    )
    if kind == "listen":
        return lay_out_prompt_clip(text, target)
    return lay_out(text, reference_MPC=reference, prompt_MPC=prompt, target_MPC=target if kind == "learn" else None)


def read_back(batch, b, segment):
    """One clip of a packed row, by segment and slot alone: tokens, patches, targets and stop labels in slot order."""
    at = np.flatnonzero(batch.segment_BT[b] == segment)
    start = at[0]
    assert (batch.position_BT[b, at] == at - start).all() and (at == start + np.arange(len(at))).all()
    mine = np.flatnonzero((batch.slot_BM[b] >= start) & (batch.slot_BM[b] < start + len(at)))
    mine = mine[np.argsort(batch.slot_BM[b, mine])]
    return (
        batch.tokens_BT[b, at], batch.patches_BMPC[b, mine], batch.slot_BM[b, mine] - start, batch.target_BM[b, mine],
        batch.stop_BM[b, mine],
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(clips, max_size=4), min_size=1, max_size=3))
def test_every_clip_can_be_read_back(rows):
    sequences = [[sequence_of(clip, (b, i)) for i, clip in enumerate(row)] for b, row in enumerate(rows)]
    T = max(1, *(sum(s.num_slots for s in row) for row in sequences), 1)
    M = max(1, *(sum(s.num_patches for s in row) for row in sequences), 1)
    batch = pack(sequences, num_slots=T, num_patches=M, patch_shape=(P, C))
    for b, row in enumerate(sequences):
        for i, s in enumerate(row):
            for found, expected in zip(read_back(batch, b, i + 1), s, strict=True):
                np.testing.assert_array_equal(found, expected.reshape(found.shape))
        num_targets, num_patches = sum(s.num_targets for s in row), sum(s.num_patches for s in row)
        assert batch.target_BM[b].tolist() == [True] * num_targets + [False] * (M - num_targets)  # targets first
        assert (batch.slot_BM[b, :num_patches] >= 0).all() and (batch.slot_BM[b, num_patches:] == -1).all()
        assert len(set(batch.slot_BM[b, :num_patches])) == num_patches
        assert (batch.tokens_BT[b, batch.slot_BM[b, :num_patches]] == 0).all()
        assert batch.stop_BM[b].sum() == sum(s.num_targets > 0 for s in row)
        assert (batch.segment_BT[b] > 0).sum() == sum(s.num_slots for s in row)
