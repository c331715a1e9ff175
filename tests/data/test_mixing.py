import dataclasses
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_packing import TARGETS, M, T, clips, lengths_of, speech_lengths
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BatchConfig, StageConfig
from voxcpm2_jax.data import mixing, packing
from voxcpm2_jax.data.clips import LENGTHS, MODES, NO_REFERENCE, OWN_REFERENCE, Draw, Index
from voxcpm2_jax.data.mixing import Mix

PATCH_SEC = 0.16
SMALL = BatchConfig(rows=2, slots=T, patches=M, target_patches=TARGETS)
LARGE = BatchConfig(rows=2, slots=1024, patches=700)
ONE_GROUP = (("a", "en"),)


def mix_of(lengths, *stages, seed=0, batch=SMALL, groups=ONE_GROUP, pairs=None):
    return Mix(seed, Index(lengths, groups, pairs), PATCH_SEC, batch, stages)


def draws(mix, steps):
    return [draw for step in steps for row in mix.rows(step) for draw in row]


@pytest.fixture(params=["large groups", "small groups"])
def either_size(request, monkeypatch):
    monkeypatch.setattr(mixing, "_FEW_ROWS", 0 if request.param == "large groups" else 1000)


def sizes_of(lengths, row):
    patches = {NO_REFERENCE: lambda d: 0, OWN_REFERENCE: lambda d: lengths["reference"][d.clip]}
    reference = np.array([patches.get(d.reference, lambda d: lengths["patches"][d.reference])(d) for d in row])
    chosen = lengths[[d.clip for d in row]]
    return packing.sizes(chosen, reference_patches=reference, is_described=np.array([d.is_described for d in row]))


# ---- epochs ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(clips, st.integers(0, 5), st.sampled_from([0, 64]))
def test_no_clip_comes_twice_before_all_came_once_and_no_budget_is_exceeded(rows, seed, few_rows):
    lengths = lengths_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "_FEW_ROWS", few_rows)
        mix = mix_of(lengths, StageConfig(prompt=None), seed=seed)
        by_kind = {False: [], True: []}  # prompt clips have epochs of their own
        for step in range(3 * len(rows)):
            for row in mix.rows(step):
                assert row and (sizes_of(lengths, row).sum(axis=0) <= (T, M, TARGETS, math.inf)).all()
                by_kind[rows[row[0].clip][3]] += [draw.clip for draw in row]
    for kind, heard in by_kind.items():
        members = [i for i, row in enumerate(rows) if row[3] == kind]
        for start in range(0, len(heard) - len(members) + 1, max(1, len(members))):
            assert sorted(heard[start : start + len(members)]) == members


def test_many_windows_and_packings(monkeypatch, either_size):
    monkeypatch.setattr(packing, "WINDOW_CLIPS", 100)
    lengths = lengths_of([(3, 5, 0, False)] * 1030)
    mix = mix_of(lengths)
    steps = len(lengths) // 4 // 2 + 60
    heard = [draw.clip for draw in draws(mix, range(40 * steps))]
    for start in range(0, len(heard) - 1030, 1030):
        assert len(set(heard[start : start + 1030])) == 1030
    far = mix.rows(10**9)
    assert far == mix_of(lengths).rows(10**9) and mix.rows(0) == mix_of(lengths).rows(0)


@settings(max_examples=30, deadline=None)
@given(clips, st.integers(0, 5), st.lists(st.integers(0, 400), min_size=1, max_size=8), st.sampled_from([0, 64]))
def test_any_step_in_any_order_is_the_same(rows, seed, steps, few_rows):
    lengths = lengths_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "_FEW_ROWS", few_rows)
        in_order, other = mix_of(lengths, seed=seed), mix_of(lengths, seed=seed)
        expected = [in_order.rows(step) for step in range(max(steps) + 1)]
        assert [other.rows(step) for step in steps] == [expected[step] for step in steps]


@pytest.mark.parametrize("clips, packings", [(400, 16), (2000, 5), (20_000, 2)])
def test_the_larger_the_corpus_the_fewer_packings(monkeypatch, clips, packings):
    monkeypatch.setattr(mixing, "_FEW_ROWS", 0)
    monkeypatch.setattr(mixing, "_MAX_DRAWS", 10_000)
    packed, add = Counter(), mixing._Stream.add
    lengths = speech_lengths(clips, max_sec=30)
    lengths["group"][: clips // 4] = 1
    mix = mix_of(lengths, batch=LARGE, groups=(("a", "en"), ("a", "de")))
    monkeypatch.setattr(mixing._Stream, "add", lambda self, *args: packed.update([id(self)]) or add(self, *args))
    mix.heard(10**6)
    assert list(packed.values()) == [packings, packings]
    mix.rows(10**6), mix.rows(10**9), mix.heard(10**9)
    assert list(packed.values()) == [packings, packings], "nothing is packed again"


def test_a_ramp_of_rows_goes_on_with_the_epoch(either_size):
    """When batches grow within an epoch, every clip still comes once before any comes twice."""
    lengths = speech_lengths(300)
    lengths["group"][:100] = 1
    rows = {0: 1, 7: 2, 12: 5}
    stages = [StageConfig(first_step=step, rows_factor=n) for step, n in rows.items()]
    mix = mix_of(lengths, *stages, batch=dataclasses.replace(LARGE, rows=1), groups=(("a", "en"), ("a", "de")))
    assert [len(mix.rows(step)) for step in (0, 6, 7, 11, 12, 13)] == [1, 1, 2, 2, 5, 5]
    heard = [draw.clip for draw in draws(mix, range(60))]
    for group in (range(100), range(100, 300)):
        mine = [clip for clip in heard if clip in group]
        assert len(mine) > 3 * len(group)
        for start in range(0, len(mine) - len(group) + 1, len(group)):
            assert sorted(mine[start : start + len(group)]) == list(group)


def test_epochs_and_seeds_have_orders_of_their_own(either_size):
    lengths = speech_lengths(300)
    first, second = ([d.clip for d in draws(mix_of(lengths, seed=seed, batch=LARGE), range(60))] for seed in (0, 1))
    for a, b in ((first[:300], first[300:600]), (first[:300], second[:300])):
        assert sorted(a) == sorted(b) == list(range(300)) and sum(x == y for x, y in zip(a, b)) < 15


def test_threads_share_a_plan(either_size):
    lengths = speech_lengths(500)
    expected = [mix_of(lengths, batch=LARGE).rows(step) for step in range(40)]
    mix = mix_of(lengths, batch=LARGE)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(mix.rows, range(39, -1, -1))) == expected[::-1]


# ---- shares ----------------------------------------------------------------------------------------------------------


def corpus(num_clips=3000):
    """Three groups of 8 : 1 : 1 hours, some prompt clips in the first; references and descriptions in the second."""
    lengths = speech_lengths(num_clips, max_sec=20)
    i = np.arange(num_clips)
    lengths["group"] = np.where(i % 10 < 8, 0, i % 10 - 7)
    lengths["is_prompt"] = i % 20 == 0
    second = lengths["group"] == 1
    lengths["reference"][second] = 20
    lengths["described"][second] = lengths["text"][second] + 6
    return lengths, (("a", "en"), ("a", "de"), ("b", "de"))


def hours_by_group(lengths, drawn):
    hours = Counter()
    for draw in drawn:
        hours[int(lengths["group"][draw.clip]), bool(lengths["is_prompt"][draw.clip])] += int(lengths["patches"][draw.clip])
    return {key: value / sum(hours.values()) for key, value in hours.items()}


def test_shares_follow_hours_temperature_and_weights():
    lengths, groups = corpus()
    for stage, expected in (
        (StageConfig(), {0: 0.8, 1: 0.1, 2: 0.1}),
        (StageConfig(temperature=2.0, prompt=0.0), {0: 0.578, 1: 0.211, 2: 0.211}),
        (StageConfig(temperature=1e9), {0: 0.5, 1: 0.25, 2: 0.25}),  # the prompt clips of the first count by themselves
        (StageConfig(weights=(("de", 4.0), ("b/de", 0.5)), prompt=0.1), {0: 0.6, 1: 0.267, 2: 0.133}),
        (StageConfig(weights=(("a", 0.0),)), {2: 1.0}),
    ):
        mix = mix_of(lengths, stage, batch=LARGE, groups=groups)
        found = Counter()
        for (group, is_prompt), share in hours_by_group(lengths, draws(mix, range(700))).items():
            found[group] += share
            if is_prompt and stage.prompt is not None:
                assert abs(share - stage.prompt) < 0.02
        assert found.keys() == expected.keys()
        for group, share in expected.items():
            assert abs(found[group] - share) < 0.025, (stage, group, found[group])


def test_the_share_of_prompt_clips_is_of_audio():
    """It is not a share of rows: rows of a group with much text hold less audio."""
    lengths, groups = corpus()
    lengths["text"][lengths["is_prompt"] > 0] *= 4
    mix = mix_of(lengths, StageConfig(prompt=0.3), batch=BatchConfig(rows=2, slots=4096, patches=2800), groups=groups)
    found = hours_by_group(lengths, draws(mix, range(300)))
    assert abs(sum(share for (_, is_prompt), share in found.items() if is_prompt) - 0.3) < 0.02


@pytest.mark.parametrize("reference", [0.0, 1.0])
def test_hours_count_whatever_the_references_take(reference):
    """Two groups of equal hours; the clips of one have references of their own length, stored with them or from pairs."""
    lengths = speech_lengths(1200, max_sec=20)
    lengths["group"] = np.arange(1200) % 2
    first = np.flatnonzero(lengths["group"] == 0)
    groups, large = (("a", "en"), ("b", "en")), BatchConfig(rows=2, slots=4096, patches=2800)
    own = lengths.copy()
    own["reference"][first] = lengths["patches"][first]
    pairs = np.full((1200, 1), -1, np.int32)
    pairs[first, 0] = np.roll(first, 1)
    hours = lengths["patches"][first].sum() / lengths["patches"].sum()
    for index in (Index(own, groups), Index(lengths, groups, pairs)):
        mix = Mix(0, index, PATCH_SEC, large, [StageConfig(reference=reference)])
        assert abs(hours_by_group(lengths, draws(mix, range(200)))[0, False] - hours) < 0.02


@pytest.mark.parametrize("window", [300, packing.WINDOW_CLIPS])
@pytest.mark.parametrize("sec", [(55, 60), (35, 60)])
def test_hours_count_whatever_room_stays_empty(monkeypatch, sec, window):
    """Two groups of equal hours; the clips of one are so long that one or two of them fill a row, which leaves room."""
    monkeypatch.setattr(packing, "WINDOW_CLIPS", window)
    rng = np.random.default_rng(0)
    short, long = speech_lengths(1500, max_sec=20), speech_lengths(1500)
    long["patches"], long["group"] = 6.25 * rng.uniform(*sec, len(long)), 1
    long["text"] = long["patches"] // 2
    long = long[np.cumsum(long["patches"]) < short["patches"].sum()]
    lengths = np.concatenate([short, long])
    hours = short["patches"].sum() / lengths["patches"].sum()
    mix = mix_of(lengths, batch=LARGE, groups=(("a", "en"), ("b", "en")))
    assert abs(hours_by_group(lengths, draws(mix, range(600)))[0, False] - hours) < 0.015


def test_stages_that_begin_at_one_step_are_refused():
    lengths, groups = corpus(300)
    with pytest.raises(UserError, match="two begin at one step; they begin at 0, 5, 5"):
        mix_of(lengths, StageConfig(), StageConfig(first_step=5), StageConfig(first_step=5), batch=LARGE, groups=groups)


def test_shares_hold_in_every_stretch():
    shares = np.array([0.7, 0.2, 0.0999, 0.0001])
    order = mixing._Interleaving((0,), shares)
    found = [order.at(i) for i in range(30000)]
    counts = Counter()
    for i, (group, n) in enumerate(found):
        assert n == counts[group]
        if i % 997 == 0:
            assert order.before(i).tolist() == [counts[g] for g in range(4)]
        counts[group] += 1
    assert [counts[g] for g in range(4)] == pytest.approx([21000, 6000, 2997, 3], abs=60)
    group, n = order.at(10**12)
    assert abs(n - 10**12 * shares[group]) < 2000


def test_modes():
    lengths, groups = corpus()
    pairs = np.full((len(lengths), 2), -1, np.int32)
    third = np.flatnonzero(lengths["group"] == 2)
    pairs[third, 0], pairs[third[::2], 1] = np.roll(third, 1), np.roll(third[::2], 3)
    mix = mix_of(lengths, StageConfig(reference=0.5, described=0.25), batch=LARGE, groups=groups, pairs=pairs)
    drawn = draws(mix, range(600))
    for group, share_reference, share_described in ((0, 0.0, 0.0), (1, 0.5, 0.25), (2, 0.5, 0.0)):
        members = [d for d in drawn if lengths["group"][d.clip] == group and not lengths["is_prompt"][d.clip]]
        assert abs(np.mean([d.reference != NO_REFERENCE for d in members]) - share_reference) < 0.06
        assert abs(np.mean([d.is_described for d in members]) - share_described) < 0.06
        for d in members:
            assert d.reference in {0: (NO_REFERENCE,), 1: (NO_REFERENCE, OWN_REFERENCE)}.get(group, (-1, *pairs[d.clip]))
    for step in range(600):
        for row in mix.rows(step):
            assert (sizes_of(lengths, row).sum(axis=0) <= packing.budgets_of(LARGE)).all()


def test_what_fits_no_row_with_its_reference_goes_without():
    lengths = np.array([(10, 15, 12, 0, 0, 0), (10, 15, 5, 0, 30, 0)], LENGTHS)
    rows = [row for step in range(20) for row in mix_of(lengths).rows(step)]
    assert {d for row in rows for d in row} == {Draw(0), Draw(1)}


def test_heard_counts_what_was_drawn(either_size):
    lengths, groups = corpus(400)
    stages = (
        StageConfig(max_sec=8.0),
        StageConfig(first_step=30, reference=0.3),
        StageConfig(first_step=50, reference=0.3, prompt=0.2),
    )
    mix = mix_of(lengths, *stages, batch=LARGE, groups=groups)
    counts = Counter()
    for step in range(400):
        if step in (0, 1, 29, 30, 31, 55, 399):
            assert {k: v[0] for k, v in mix.heard(step).items()} == {k[:3]: n for k, n in counts.items() if k[3] == "clips"}
            assert {k: v[1] for k, v in mix.heard(step).items()} == {k[:3]: n for k, n in counts.items() if k[3] == "patches"}
        for d in draws(mix, [step]):
            mode = MODES[d.is_described + 2 * (d.reference != NO_REFERENCE)]
            mode = "prompt" if lengths["is_prompt"][d.clip] else mode
            name = (*groups[lengths["group"][d.clip]], mode)
            counts[(*name, "clips")] += 1
            counts[(*name, "patches")] += int(lengths["patches"][d.clip])


stage_choices = st.tuples(
    st.sampled_from([0.0, 0.5, 0.8]),  # min_sec, of clips of 0.16 to 1.92 s
    st.sampled_from([1.0, 2.0]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([(1.0, 1.0), (1.5, 1.2)]),  # factors of rows and slots
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 5), st.sampled_from([0, 64]))
def test_rows_and_heard_of_any_corpus_and_curriculum(data, seed, few_rows):
    """Compared with a walk through the steps: budgets, clip lengths, groups, parts of a step, counts before every step."""
    table = data.draw(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 12), st.integers(0, 5), st.integers(0, 4),
                                         st.booleans(), st.integers(0, 2)), min_size=3, max_size=50))  # fmt: skip
    lengths = np.array([(t, p, r, q, t + d if d else 0, g) for t, p, r, d, q, g in table], LENGTHS)
    lengths["patches"][0], lengths["is_prompt"][0] = 6, False  # something for every stage
    groups = (("a", "en"), ("a", "de"), ("b", "de"))
    some_pairs = np.random.default_rng(seed).integers(-1, len(table), (len(table), 2))
    pairs = data.draw(st.sampled_from([None, -np.sort(-some_pairs)]))
    firsts = sorted({0, *data.draw(st.lists(st.integers(1, 25), max_size=2))})
    stages = []
    for first in firsts:
        min_sec, temperature, reference, described, factors = data.draw(stage_choices)
        stages.append(StageConfig(first, min_sec, None, temperature, (), reference, described, None, *factors))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "_FEW_ROWS", few_rows)
        mix = mix_of(lengths, *stages, seed=seed, groups=groups, pairs=pairs)
        counts: dict[tuple, np.ndarray] = {}
        for step in range(30):
            assert mix.heard(step) == {name: tuple(heard.tolist()) for name, heard in counts.items()}, step
            stage = [stage for stage in stages if stage.first_step <= step][-1]
            rows = mix.rows(step)
            batch = stage.batch_of(SMALL)
            assert len(rows) == batch.rows and rows[1:] == mix.rows(step, range(1, len(rows)))
            for row in rows:
                budgets = packing.budgets_of(batch)
                assert row and (sizes_of(lengths, row).sum(axis=0) <= budgets).all()
                assert len({(lengths["group"][d.clip], lengths["is_prompt"][d.clip]) for d in row}) == 1
                for d in row:
                    _, patches, own, is_prompt, described, group = lengths[d.clip].tolist()
                    assert patches * PATCH_SEC >= stage.min_sec and (described or not d.is_described)
                    partners = set() if pairs is None or own else set(pairs[d.clip].tolist()) - {-1}
                    allowed = {NO_REFERENCE, *partners, *([OWN_REFERENCE] if own else [])}
                    assert d.reference in ({NO_REFERENCE} if is_prompt or not stage.reference else allowed)
                    mode = "prompt" if is_prompt else MODES[d.is_described + 2 * (d.reference != NO_REFERENCE)]
                    name = (*groups[group], mode)
                    counts[name] = counts.get(name, 0) + np.array([1, patches])


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_stages_have_lengths_and_budgets_of_their_own():
    lengths = speech_lengths(400)
    longer = LARGE.scaled(rows=1.5, slots=2.0)
    mix = mix_of(lengths, StageConfig(first_step=10, rows_factor=1.5, slots_factor=2.0), StageConfig(max_sec=5.0), batch=LARGE)
    early, late = ([row for step in steps for row in mix.rows(step)] for steps in (range(10), range(10, 40)))
    assert max(lengths["patches"][d.clip] for row in early for d in row) * PATCH_SEC <= 5.0
    assert len(early) == 20 and len(late) == 90 and mix.batch_of(9) == LARGE and mix.batch_of(10) == longer
    assert 1024 < max(sizes_of(lengths, row)[:, 0].sum() for row in late) <= 2048


def test_no_row_holds_more_clips_than_it_may(either_size):
    lengths = speech_lengths(300)
    free, bound = (mix_of(lengths, batch=dataclasses.replace(LARGE, segments=n)) for n in (None, 3))
    clips_of = [len(row) for step in range(60) for row in bound.rows(step)]
    assert max(len(row) for step in range(20) for row in free.rows(step)) > 3
    assert max(clips_of) == 3 and np.mean(clips_of) > 2.5
    assert {draw.clip for draw in draws(bound, range(60))} == set(range(300))


def test_a_stage_that_wants_the_same_of_a_group_goes_on_with_its_epoch():
    lengths, groups = corpus(400)
    stages = StageConfig(), StageConfig(first_step=7, weights=(("b", 3.0),))
    mix = mix_of(lengths, *stages, batch=LARGE, groups=groups)
    heard = [d.clip for d in draws(mix, range(60)) if lengths["group"][d.clip] == 0 and not lengths["is_prompt"][d.clip]]
    members = set(np.flatnonzero((lengths["group"] == 0) & (lengths["is_prompt"] == 0)).tolist())
    assert len(heard) > len(members) and set(heard[: len(members)]) == members


@pytest.mark.parametrize(
    "stages, message",
    [
        ([StageConfig(first_step=3)], "expected one from step 0 on; the first begins at step 3"),
        ([StageConfig(max_sec=0.1)], "from step 0 has no clips of 0.0 to 0.1 s"),
        ([StageConfig(weights=(("english", 1.0),))], "weights: no english in this corpus; it has a, a/en, en"),
        ([StageConfig(prompt=0.5)], "from step 0: a share of 0.5 for prompt clips, but there are none"),
        ([StageConfig(weights=(("a", 0.0),))], "all weights are 0"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be(stages, message):
    with pytest.raises(UserError, match=message):
        mix_of(speech_lengths(50), *stages, batch=LARGE)


def test_clips_that_fit_no_row_are_refused():
    lengths = lengths_of([(3, 5, 0, False), (30, 10, 0, False), (1, 22, 0, False)])
    with pytest.raises(
        UserError, match="2 of 3 clips take more than 40 slots, 25 patches or 20 target patches; the largest take 42, 22"
    ):
        mix_of(lengths)


@pytest.mark.parametrize("limits", [{"batch": 15}, {"stage": 15}, {"batch": 40, "stage": 15}])
def test_a_clip_may_take_less_than_a_row(limits):
    """With its reference clip too: where that is too long, the clip goes without."""
    batch = dataclasses.replace(SMALL, clip_slots=limits.get("batch"))
    stage = StageConfig(clip_slots=limits.get("stage"))
    lengths = lengths_of([(3, 5, 4, False), (3, 5, 0, False)] * 20)
    rows = mix_of(lengths, stage, batch=batch).rows(0)
    assert {draw.reference for row in rows for draw in row} == {mixing.NO_REFERENCE}
    with pytest.raises(UserError, match=r"1 of 41 clips take more than 15 slots.* the largest take 16,"):
        mix_of(lengths_of([(3, 5, 0, False)] * 40 + [(4, 10, 0, False)]), stage, batch=batch)
