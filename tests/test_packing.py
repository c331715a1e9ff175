import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxcpm2_jax.config import UserError
from voxcpm2_jax.data import packing
from voxcpm2_jax.data.packing import PackPlan

T, M, TARGETS = 40, 25, 20
clips = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 12), st.integers(0, 5), st.booleans()), min_size=1, max_size=60)


def lengths_of(rows):
    return np.array([(t, m, r, p) for t, m, r, p in rows], np.int32)


def speech_lengths(num_clips, seed=0):
    """Log-normal durations as in speech corpora: median 7 s, sigma 0.6, 3.2 tokens and 6.25 patches a second."""
    rng = np.random.default_rng(seed)
    sec = (7 * np.exp(0.6 * rng.standard_normal(num_clips))).clip(0.5, 60)
    zeros = np.zeros(num_clips)
    return np.stack([np.maximum(1, rng.poisson(3.2 * sec)), np.ceil(6.25 * sec), zeros, zeros], axis=1).astype(np.int32)


def plan_of(lengths, seed=0, **options):
    options = {"num_rows": 2, "num_slots": T, "num_patches": M, "target_patches": TARGETS} | options
    return PackPlan(seed, packing.sizes(lengths), **options)


def epochs(plan, num_clips, count):
    """The clips of each epoch, in order; no row may hold clips of two epochs."""
    found, step = [[]], 0
    while len(found) <= count:
        for row in plan.rows(step):
            if len(found[-1]) == num_clips:
                found.append([])
            found[-1] += row
        step += 1
    return found[:count]


@settings(max_examples=60, deadline=None)
@given(clips, st.integers(0, 5))
def test_every_clip_comes_once_an_epoch_and_no_budget_is_exceeded(rows, seed):
    lengths = lengths_of(rows)
    sizes_N3 = packing.sizes(lengths)
    plan = plan_of(lengths, seed)
    for epoch in epochs(plan, len(rows), 3):
        assert sorted(epoch) == list(range(len(rows)))
    for step in range(5):
        for row in plan.rows(step):
            assert row and (sizes_N3[row].sum(axis=0) <= (T, M, TARGETS)).all()


@settings(max_examples=30, deadline=None)
@given(clips, st.integers(0, 5), st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_any_step_in_any_order_is_the_same(rows, seed, steps):
    lengths = lengths_of(rows)
    in_order = plan_of(lengths, seed)
    expected = [in_order.rows(step) for step in range(max(steps) + 1)]
    other = plan_of(lengths, seed)
    assert [other.rows(step) for step in steps] == [expected[step] for step in steps]


def test_many_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_CLIPS", 100)
    lengths = lengths_of([(3, 5, 0, False)] * 1030)
    plan = plan_of(lengths)
    for epoch in epochs(plan, len(lengths), 3):
        assert sorted(epoch) == list(range(len(lengths)))
    far = plan.rows(400)
    assert plan.rows(0) == plan_of(lengths).rows(0) and plan.rows(400) == far  # windows dropped and packed again


def test_epochs_and_seeds_have_orders_of_their_own():
    lengths = speech_lengths(300)
    first, second = epochs(plan_of(lengths, 0, num_slots=4096, num_patches=4096, target_patches=None), 300, 2)
    (other,) = epochs(plan_of(lengths, 1, num_slots=4096, num_patches=4096, target_patches=None), 300, 1)
    for a, b in itertools.combinations((first, second, other), 2):
        assert sum(x == y for x, y in zip(a, b)) < 15


def test_fill_on_speech_lengths():
    sizes_N3 = packing.sizes(speech_lengths(20000))
    num_patches = packing.recommend_patches(sizes_N3, 4096)
    plan = PackPlan(0, sizes_N3, num_rows=4, num_slots=4096, num_patches=num_patches)
    rows = [row for step in range(100) for row in plan.rows(step)]
    fill = np.mean([sizes_N3[row].sum(axis=0) for row in rows], axis=0) / (4096, num_patches, num_patches)
    assert fill[0] >= 0.97 and fill[1] >= 0.95, fill


def test_recommended_patches_hold_the_longest_clip():
    sizes_N3 = packing.sizes(lengths_of([(30, 2, 0, False)] * 50 + [(2, 90, 0, False)]))
    assert packing.recommend_patches(sizes_N3, 100) >= 90
    with_reference = packing.sizes(lengths_of([(5, 20, 10, False)] * 20))
    assert packing.recommend_patches(with_reference, 390, 2) < packing.recommend_patches(with_reference, 390)


def test_clips_that_fit_no_row_are_refused():
    lengths = lengths_of([(3, 5, 0, False), (30, 10, 0, False), (1, 22, 0, False)])
    with pytest.raises(
        UserError, match="2 of 3 clips fit no row of 40 slots, 25 patches and 20 target patches; the largest take 42, 22"
    ):
        plan_of(lengths)
    with pytest.raises(UserError, match="at least one clip"):
        plan_of(np.zeros((0, 4), np.int32))


def test_stages_begin_with_short_clips():
    lengths = speech_lengths(400)
    sizes_N3 = packing.sizes(lengths)
    options = {"num_slots": 1024, "num_patches": 700, "target_patches": None}
    plan = plan_of(lengths, stages=[(0, 50), (10, 1024)], **options)
    assert all(sizes_N3[row, 0].max() <= 50 for step in range(10) for row in plan.rows(step))
    plain = plan_of(lengths, **options)
    assert [plan.rows(step) for step in range(10, 15)] == [plain.rows(step) for step in range(5)]
    for stages in ([(5, 1024)], [(0, 50)]):
        with pytest.raises(UserError, match="expected one from step 0, and a last one for all clips"):
            plan_of(lengths, stages=stages, **options)


def test_threads_share_a_plan():
    lengths = speech_lengths(500)
    options = {"num_slots": 1024, "num_patches": 700, "target_patches": None}
    expected = [plan_of(lengths, **options).rows(step) for step in range(40)]
    plan = plan_of(lengths, **options)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(plan.rows, range(39, -1, -1))) == expected[::-1]


class InMemory(list):
    patch_shape, patch_sec = (2, 3), 0.16


def test_sizes_are_those_of_the_sequences_and_a_batch_holds_them():
    rng = np.random.default_rng(0)

    def patches(m):
        return rng.standard_normal((m, 2, 3)).astype(np.float32)

    rows = [(4, 5, 0, False), (2, 3, 4, False), (3, 6, 0, True), (1, 1, 0, False), (5, 4, 2, True)]
    source = InMemory(packing.Clip(rng.integers(105, 200, t), patches(m), patches(r) if r else None, p) for t, m, r, p in rows)
    sizes_N3 = packing.sizes(lengths_of(rows))
    for clip, size in zip(source, sizes_N3):
        sequence = packing.lay_out_clip(clip)
        assert (sequence.num_slots, sequence.num_patches, sequence.num_targets) == tuple(size)
    batch = packing.assemble(source, [[0, 1], [2, 3, 4]], num_slots=T, num_patches=M)
    assert batch.tokens_BT.shape == (2, T) and batch.patches_BMPC.shape == (2, M, 2, 3)
    assert batch.target_BM.sum() == sizes_N3[:, 2].sum() and (batch.slot_BM >= 0).sum() == sizes_N3[:, 1].sum()
    assert (batch.segment_BT > 0).sum() == sizes_N3[:, 0].sum()
    for row, targets in zip(batch.target_BM, (8, 1)):
        assert row[:targets].all() and not row[targets:].any()


def test_synthetic_corpus():
    source = packing.synthetic_corpus(3, num_clips=40, vocab_size=128, patch_shape=(2, 8))
    again = packing.synthetic_corpus(3, num_clips=40, vocab_size=128, patch_shape=(2, 8))
    all_patches = []
    for i in (7, 3, 39):
        clip, other = source[i], again[i]
        np.testing.assert_array_equal(clip.patches_MPC, other.patches_MPC)
        np.testing.assert_array_equal(clip.text_ids, other.text_ids)
        assert (
            len(clip.text_ids) == source.lengths[i, packing.TEXT]
            and len(clip.patches_MPC) == source.lengths[i, packing.PATCHES]
        )
        assert clip.text_ids.min() > 104 and clip.text_ids.max() < 128 and clip.patches_MPC.dtype == np.float32
    # What a token sounds like is the same wherever it occurs.
    heard: dict[int, list] = {}
    for i in range(40):
        clip = source[i]
        all_patches.append(clip.patches_MPC)
        for j, token in enumerate(clip.text_ids):
            heard.setdefault(int(token), []).extend(clip.patches_MPC[2 * j : 2 * j + 2])
    within = np.mean([np.var(patches, axis=0).mean() for patches in heard.values() if len(patches) > 8])
    total = np.var(np.concatenate(all_patches))
    assert 0.8 < total < 1.2 and within < 0.15
    other = packing.synthetic_corpus(4, num_clips=40, vocab_size=128, patch_shape=(2, 8))
    assert not np.array_equal(source.lengths, other.lengths)
