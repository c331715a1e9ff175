import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxcpm2_jax.data import packing, pipeline, synthetic
from voxcpm2_jax.data.clips import LENGTHS, OWN_REFERENCE, Clip, Draw, Index, label_names, label_patches, lay_out_draw

pytestmark = pytest.mark.fast

T, M, TARGETS = 40, 25, 20
BUDGETS = np.array(packing.Budgets(T, M, TARGETS))
clips = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 12), st.integers(0, 5), st.booleans()), min_size=1, max_size=60)


def lengths_of(rows):
    """Clips given as (text, patches, reference patches, is_prompt), none described, all of one group."""
    return np.array([(*row, 0, 0) for row in rows], LENGTHS)


def speech_lengths(num_clips, seed=0, max_sec=60):
    """Log-normal durations as in speech corpora: median 7 s, sigma 0.6, 3.2 tokens and 6.25 patches per second."""
    rng = np.random.default_rng(seed)
    sec = (7 * np.exp(0.6 * rng.standard_normal(num_clips))).clip(0.5, max_sec)
    lengths = np.zeros(num_clips, LENGTHS)
    lengths["text"], lengths["patches"] = np.maximum(1, rng.poisson(3.2 * sec)), np.ceil(6.25 * sec)
    return lengths


def loads(sizes, row_of_clip, num_rows):
    total = np.zeros((num_rows, sizes.shape[1]), np.int64)
    np.add.at(total, row_of_clip, sizes)
    return total


@settings(max_examples=60, deadline=None)
@given(clips, st.sampled_from([0, 2, 1000]))
def test_no_budget_is_exceeded(rows, deal_from):
    sizes = packing.sizes(lengths_of(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_DEAL_FROM_CLIPS_PER_ROW", deal_from)
        row_of_clip, num_rows = packing.share_rows(sizes / BUDGETS)
    total = loads(sizes, row_of_clip, num_rows)
    assert (total <= BUDGETS).all() and set(row_of_clip) == set(range(num_rows))
    starts = packing.fill_in_turn(sizes, BUDGETS)
    assert starts[0] == 0 and starts[-1] == len(rows) and (np.diff(starts) > 0).all()
    for start, end, following in zip(starts, starts[1:], [*starts[2:], None]):
        assert (sizes[start:end].sum(axis=0) <= BUDGETS).all()
        if following is not None:  # the next one really had no room
            assert (sizes[start : end + 1].sum(axis=0) > BUDGETS).any()


def best_fit_of_one_window(fractions, most_open):
    """Best fit as a plain loop over items and open rows."""
    rooms, row_of_item, num_rows = {}, [], 0  # the room of each open row by its number, the first opened first
    for item in fractions:
        left = {number: (room - item).min() for number, room in rooms.items()}
        left = {number: least for number, least in left.items() if least >= -packing._SLACK}
        if left:
            number = min(left, key=left.get)  # of several, the first
        else:
            rooms = {n: room for n, room in rooms.items() if (room >= fractions.min(axis=0) - packing._SLACK).all()}
            rooms = dict(list(rooms.items())[-most_open + 1 :])
            number, num_rows = num_rows, num_rows + 1
            rooms[number] = np.ones(fractions.shape[1])
        rooms[number] = rooms[number] - item
        row_of_item.append(number)
    return row_of_item, num_rows


@settings(max_examples=60, deadline=None)
@given(st.lists(clips, min_size=1, max_size=5), st.sampled_from([2, 3, 64]), st.sampled_from([20, 25]), st.booleans())
def test_windows_are_packed_together_as_one_after_the_other(windows, most_open, targets, with_references):
    """Of different lengths, with many ties, whichever budgets decide."""
    budgets = np.array(packing.Budgets(T, M, targets, clips=4))
    reference = None if with_references else 0
    fractions = [packing.sizes(lengths_of(rows), reference_patches=reference) / budgets for rows in windows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_OPEN_ROWS", most_open)
        patch.setattr(packing, "_WINDOWS_AT_ONCE", 3)
        patch.setattr(packing, "_DEAL_FROM_CLIPS_PER_ROW", math.inf)
        found = [(rows.tolist(), num_rows) for rows, num_rows in packing.share_windows(fractions)]
    assert found == [best_fit_of_one_window(window, most_open) for window in fractions]


@pytest.mark.parametrize("num_slots", [1024, 2048, 4096, 8192])
def test_fill_on_speech_lengths(num_slots):
    sizes = packing.sizes(speech_lengths(packing.WINDOW_CLIPS))
    budgets = np.array(packing.Budgets(num_slots, *[packing.recommend_patches(sizes, num_slots)] * 2))
    _, num_rows = packing.share_rows(sizes / budgets)
    fill = sizes.sum(axis=0) / num_rows / budgets
    assert fill[packing.SLOTS] >= 0.97 and fill[packing.PATCHES] >= 0.95, fill


def test_recommended_patches_hold_the_longest_clip():
    sizes = packing.sizes(lengths_of([(30, 2, 0, False)] * 50 + [(2, 90, 0, False)]))
    assert packing.recommend_patches(sizes, 100) >= 90


class InMemory(list):
    patch_shape, patch_sec = (2, 3), 0.16


def test_sizes_are_those_of_the_sequences_and_a_batch_holds_them():
    rng = np.random.default_rng(0)

    def patches(m):
        return rng.standard_normal((m, 2, 3)).astype(np.float32)

    def ids(n):
        return rng.integers(105, 200, n).astype(np.int32)

    rows = [
        (4, 5, 0, False, 0, 0),
        (2, 3, 4, False, 6, 0),
        (3, 6, 0, True, 0, 0),
        (1, 1, 0, False, 3, 0),
        (5, 4, 2, True, 7, 0),
    ]
    source = InMemory(
        Clip(ids(t), patches(m), patches(r) if r else None, ids(d) if d else None, p) for t, m, r, p, d, _ in rows
    )
    lengths = np.array(rows, LENGTHS)
    source.index = Index(lengths, (("books", "en"),))
    draws = [Draw(i, OWN_REFERENCE if r else -1, d > 0) for i, (_, _, r, _, d, _) in enumerate(rows)]
    plain = [Draw(i) for i in range(len(rows))]
    paired = [Draw(0, 3), Draw(1, 0), Draw(2, 0), Draw(3, 1), Draw(4, 1)]
    pair_patches = lengths["patches"][[3, 0, 0, 1, 1]]
    for chosen, sizes in (
        (draws, packing.sizes(lengths)),
        (plain, packing.sizes(lengths, reference_patches=0, is_described=False)),
        (paired, packing.sizes(lengths, reference_patches=pair_patches, is_described=False)),
    ):
        for draw, size in zip(chosen, sizes):
            sequence = lay_out_draw(source, draw)
            assert (sequence.num_slots, sequence.num_patches, sequence.num_targets, 1) == tuple(size)
    sizes = packing.sizes(lengths)
    batch = pipeline.assemble(source, [draws[:2], draws[2:]], num_slots=T, num_patches=M)
    assert batch.tokens_BT.shape == (2, T) and batch.patches_BMPC.shape == (2, M, 2, 3)
    slots, patches, targets, _ = sizes.sum(axis=0)
    assert batch.target_BM.sum() == targets and (batch.slot_BM >= 0).sum() == patches
    assert (batch.segment_BT > 0).sum() == slots
    for row, targets in zip(batch.target_BM, (8, 1)):
        assert row[:targets].all() and not row[targets:].any()
    modes = ["zero-shot"] * 5 + ["described reference"] * 3 + ["described reference"] * 4  # targets first, then references
    names = label_names(source.index)
    assert [names[i] for i in batch.label_BM[0, :12]] == [("books", "en", mode) for mode in modes]
    assert [names[i][2] for i in batch.label_BM[1, :11]] == ["described"] + ["prompt"] * 10
    assert (batch.label_BM[batch.slot_BM < 0] == -1).all()
    assert label_patches(source.index).tolist() == [5 + 3 + 1, 3 + 1, 3, 3, 0]


def test_synthetic_corpus():
    source = synthetic.Synthetic(3, num_clips=40, vocab_size=128, patch_shape=(2, 8))
    again = synthetic.Synthetic(3, num_clips=40, vocab_size=128, patch_shape=(2, 8))
    all_patches = []
    for i in (7, 3, 39):
        clip, other = source[i], again[i]
        np.testing.assert_array_equal(clip.patches_MPC, other.patches_MPC)
        np.testing.assert_array_equal(clip.text_ids, other.text_ids)
        assert (
            len(clip.text_ids) == source.index.lengths["text"][i]
            and len(clip.patches_MPC) == source.index.lengths["patches"][i]
        )
        assert clip.text_ids.min() > 104 and clip.text_ids.max() < 128 and clip.patches_MPC.dtype == np.float32
    # A token has the same mean patch wherever it occurs.
    heard: dict[int, list] = {}
    for i in range(40):
        clip = source[i]
        all_patches.append(clip.patches_MPC)
        for j, token in enumerate(clip.text_ids):
            heard.setdefault(int(token), []).extend(clip.patches_MPC[2 * j : 2 * j + 2])
    within = np.mean([np.var(patches, axis=0).mean() for patches in heard.values() if len(patches) > 8])
    total = np.var(np.concatenate(all_patches))
    assert 0.8 < total < 1.2 and within < 0.15
    other = synthetic.Synthetic(4, num_clips=40, vocab_size=128, patch_shape=(2, 8))
    assert not np.array_equal(source.index.lengths, other.index.lengths)
