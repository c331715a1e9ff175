"""What is heard when: the clips of every row of every step, a pure function of (seed, index, stages).

    group     the clips of one dataset and language; prompt clips are groups of their own
    stage     from its first step on: which lengths, which shares of groups and modes, which budgets a row has
    stream    a group's endless sequence of rows, epoch after epoch: no clip comes twice before all came once
    row i     of a stage -> a group, so that every stretch of rows holds each by its share -> that stream's next row

A row holds clips of one group; a batch mixes rows. Everything is found by arithmetic: any step, however late, costs no
more than the first, once the ways of packing it needs are made; and what was heard before a step is counted without a
walk through the steps before it.

    epoch i of a large group   way i modulo their number, with its rows in an order of its own
    epochs of a small group    packed one after the other, across their borders, so that no row stays half empty

numpy only, so that a plan can be made anywhere.
"""

import functools
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BatchConfig, StageConfig
from voxcpm2_jax.data import packing
from voxcpm2_jax.data.packing import (
    DESCRIBED,
    GROUP,
    IS_PROMPT,
    MODES,
    NO_REFERENCE,
    OWN_REFERENCE,
    PATCHES,
    REFERENCE,
    Draw,
    Index,
)

_DRAWS_OF_ALL_WAYS = 1 << 23  # of all groups: bounds time and memory; 2 to 16 ways of packing a large group
_FEW_ROWS = 64  # of an epoch: a group with fewer is small
_BLOCK_ROWS = 1024  # hold every group by its share, to one row


class Mix:
    """The rows of every step.

    Args:
        seed: of all orders and choices.   index: of the corpus.   patch_sec: seconds of a patch.
        batch: budgets, for stages that set none of their own.   stages: none: all clips, as they are.
    Raises:
        UserError: no stage from step 0 on, a stage without clips, a clip that fits no row, a weight or a share of what
            is not there.
    """

    def __init__(self, seed: int, index: Index, patch_sec: float, batch: BatchConfig, stages: Sequence[StageConfig] = ()):
        self._index = index
        stages = sorted(stages or [StageConfig()], key=lambda stage: stage.first_step)
        if stages[0].first_step:
            raise UserError(f"stages: expected one from step 0 on; the first begins at step {stages[0].first_step}")
        if len({stage.first_step for stage in stages}) < len(stages):
            raise UserError(f"stages: two begin at one step; they begin at {', '.join(str(s.first_step) for s in stages)}")
        self._stages: list[_Stage] = []
        streams: dict[tuple, _Stream] = {}
        heard: dict[tuple, int] = {}  # rows of each stream
        for i, config in enumerate(stages):
            budgets = config.batch or batch
            if self._stages:
                last = self._stages[-1]
                rows = (config.first_step - last.first_step) * last.batch.rows
                heard |= {form: offset + n for form, offset, n in zip(last.forms, last.offsets, last.order.before(rows))}
            shares = _shares(index, config, patch_sec, _budgets(budgets))
            forms = []
            for key, (clips, _) in shares.items():
                # Stages that want the same of a group go on with its epochs; others begin anew.
                form = (key, config.min_sec, config.max_sec, config.reference, config.described, *_budgets(budgets))
                if form not in streams:
                    streams[form] = _Stream((seed, len(streams)), index, clips, config, _budgets(budgets))
                forms.append(form)
            self._stages.append(
                _Stage(
                    first_step=config.first_step,
                    batch=budgets,
                    groups=tuple(key // 2 for key in shares),
                    forms=tuple(forms),
                    streams=tuple(streams[form] for form in forms),
                    offsets=tuple(heard.get(form, 0) for form in forms),
                    order=_Interleaving((seed, i), np.array([share for _, share in shares.values()])),
                )
            )

    @property
    def batches(self) -> tuple[BatchConfig, ...]:
        """The budgets of all stages, each once."""
        return tuple(dict.fromkeys(stage.batch for stage in self._stages))

    def batch_of(self, step: int) -> BatchConfig:
        """The budgets of a step."""
        return self._stage(step).batch

    def rows(self, step: int, some: Sequence[int] | None = None) -> list[list[Draw]]:
        """What each of the B rows of a step holds, or each of some of them by number."""
        stage = self._stage(step)
        first = (step - stage.first_step) * stage.batch.rows
        found = [stage.order.at(first + row) for row in (range(stage.batch.rows) if some is None else some)]
        return [stage.streams[g].row(stage.offsets[g] + n) for g, n in found]

    def heard(self, step: int) -> dict[tuple[str, str, str], tuple[int, int]]:
        """What was heard before a step: (dataset, language, mode) -> (clips, patches), references not counted."""
        totals: dict[tuple[str, str, str], np.ndarray] = {}
        for stage, following in zip(self._stages, [*self._stages[1:], None]):
            end = step if following is None else min(step, following.first_step)
            if end <= stage.first_step:
                break
            counts = stage.order.before((end - stage.first_step) * stage.batch.rows)
            for group, stream, offset, n in zip(stage.groups, stage.streams, stage.offsets, counts):
                for mode, heard in zip(MODES, stream.heard(offset + n) - stream.heard(offset)):
                    name = (*self._index.groups[group], mode)
                    totals[name] = totals.get(name, 0) + heard
        return {name: (int(clips), int(patches)) for name, (clips, patches) in sorted(totals.items()) if clips}

    def _stage(self, step: int) -> "_Stage":
        return [stage for stage in self._stages if stage.first_step <= step][-1]


class _Stage(NamedTuple):
    """A stage of the curriculum, resolved; one entry a group."""

    first_step: int
    batch: BatchConfig
    groups: tuple[int, ...]
    forms: tuple[tuple, ...]  # what is wanted of the group
    streams: tuple["_Stream", ...]
    offsets: tuple[int, ...]  # rows of the stream that earlier stages heard
    order: "_Interleaving"


def _budgets(batch: BatchConfig) -> tuple[float, ...]:
    """Of a row: slots, patches, target patches, clips."""
    return batch.slots, batch.patches, batch.target_patches or batch.patches, batch.segments or math.inf


def _and_one_clip(sizes_N3: np.ndarray) -> np.ndarray:
    """What clips take of the four budgets of a row."""
    return np.pad(sizes_N3, ((0, 0), (0, 1)), constant_values=1)


# ---- shares ----------------------------------------------------------------------------------------------------------


def _shares(
    index: Index, stage: StageConfig, patch_sec: float, budgets: tuple[float, ...]
) -> dict[int, tuple[np.ndarray, float]]:
    """The groups of a stage: 2 x group, + 1 for its prompt clips -> (clips, share of the rows)."""
    sec = index.lengths[:, PATCHES] * patch_sec
    chosen = np.flatnonzero((sec >= stage.min_sec) & (sec <= (math.inf if stage.max_sec is None else stage.max_sec)))
    if not len(chosen):
        raise UserError(f"the stage from step {stage.first_step} has no clips of {stage.min_sec} to {stage.max_sec} s")
    names = {name for group in index.groups for name in (*group, "/".join(group))}
    unknown = sorted({name for name, _ in stage.weights} - names)
    if unknown:
        raise UserError(f"weights: no {', '.join(unknown)} in this corpus; it has {', '.join(sorted(names))}")
    key_N = 2 * index.lengths[chosen, GROUP] + (index.lengths[chosen, IS_PROMPT] > 0)
    clips = {int(key): chosen[key_N == key].astype(np.int32) for key in np.unique(key_N)}
    weight, rows_a_patch = {}, {}
    for key, members in clips.items():
        group = index.groups[key // 2]
        factor = math.prod(factor for name, factor in stage.weights if name in (*group, "/".join(group)))
        patches = index.lengths[members, PATCHES].sum()
        weight[key] = factor * float(patches) ** (1 / stage.temperature)
        rows_a_patch[key] = float((_mean_sizes(index, members, stage) * len(members) / budgets).max() / patches)
    if stage.prompt is not None:
        for is_prompt, share in ((1, stage.prompt), (0, 1 - stage.prompt)):
            keys = [key for key in weight if key % 2 == is_prompt]
            total = sum(weight[key] for key in keys)
            if share and not total:
                raise UserError(f"the stage from step {stage.first_step}: a share of {share} for what the corpus has not")
            weight |= {key: weight[key] / total * share for key in keys if total}
    # So far of hours; those of a group with much text or many references take more rows.
    weight = {key: of_hours * rows_a_patch[key] for key, of_hours in weight.items()}
    total = sum(weight.values())
    if not total:
        raise UserError(f"the stage from step {stage.first_step}: all weights are 0")
    return {key: (clips[key], weight[key] / total) for key in clips if weight[key] > 0}


def _mean_sizes(index: Index, clips: np.ndarray, stage: StageConfig) -> np.ndarray:
    """What a clip takes of the four budgets on average, with a stage's shares of references and descriptions."""
    lengths = index.lengths[clips].copy()
    if index.pairs is not None:
        has_pair_N = (index.pairs[clips] >= 0).any(axis=1) & (lengths[:, REFERENCE] == 0)
        lengths[has_pair_N, REFERENCE] = round(float(lengths[:, PATCHES].mean()))
    plain_3 = packing.sizes(lengths, reference_N=0, is_described=False).mean(axis=0)
    reference_3 = packing.sizes(lengths, is_described=False).mean(axis=0) - plain_3
    described_3 = packing.sizes(lengths, reference_N=0).mean(axis=0) - plain_3
    return np.append(plain_3 + stage.reference * reference_3 + stage.described * described_3, 1.0)


class _Interleaving:
    """An endless sequence of groups. Each stretch of it holds every group by its share."""

    def __init__(self, seed, share_G: np.ndarray):
        self._seed, self._share_G = seed, share_G
        # The largest group fills what the others leave; that many rows always leave it some.
        self._block = max(_BLOCK_ROWS, len(share_G) ** 2)
        self._phase_G = np.random.default_rng(seed).random(len(share_G))
        self._order = functools.lru_cache(8)(self._order)

    def at(self, i: int) -> tuple[int, int]:
        """The group of the i-th row, and how many of its rows come before."""
        block, i = divmod(i, self._block)
        order, rank = self._order(block)
        return int(order[i]), int(rank[i])

    def before(self, i: int) -> np.ndarray:
        """How many of the first i rows are of each group."""
        block, i = divmod(i, self._block)
        counts_G = self._before_block(block)
        return counts_G + np.bincount(self._order(block)[0][:i], minlength=len(counts_G)) if i else counts_G

    def _before_block(self, block: int) -> np.ndarray:
        counts_G = np.floor(block * self._block * self._share_G + self._phase_G).astype(np.int64)
        main = self._share_G.argmax()
        counts_G[main] += block * self._block - counts_G.sum()
        return counts_G

    def _order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        before_G = self._before_block(block)
        counts_G = self._before_block(block + 1) - before_G
        order = np.random.default_rng((*self._seed, block)).permutation(np.repeat(np.arange(len(counts_G)), counts_G))
        rank = np.zeros(len(order), np.int64)
        for group in range(len(counts_G)):
            rank[order == group] = before_G[group] + np.arange(counts_G[group])
        return order, rank


# ---- one group's rows ------------------------------------------------------------------------------------------------


class _Way(NamedTuple):
    """One way of packing: row r holds the draws start_R[r] .. start_R[r + 1] - 1."""

    clip_N: np.ndarray
    reference_N: np.ndarray
    described_N: np.ndarray
    start_R: np.ndarray
    heard_RK2: np.ndarray  # clips and patches of each row by mode

    @property
    def num_rows(self) -> int:
        return len(self.start_R) - 1


class _Stream:
    """An endless sequence of packed rows of some clips, by random access; safe to share between threads."""

    def __init__(self, seed, index: Index, clips: np.ndarray, stage: StageConfig, budgets: tuple[float, ...]):
        self._seed, self._index, self._clips, self._stage = seed, index, clips, stage
        self._budgets = np.array(budgets)
        smallest = _and_one_clip(packing.sizes(index.lengths[clips], reference_N=0, is_described=False))
        too_big = np.flatnonzero((smallest > self._budgets).any(axis=1))
        if len(too_big):
            slots, patches, targets, _ = smallest[too_big].max(axis=0)
            raise UserError(
                f"{len(too_big)} of {len(clips)} clips fit no row of {budgets[0]} slots, {budgets[1]} patches and "
                f"{budgets[2]} target patches; the largest take {slots}, {patches} and {targets}: raise the budgets or "
                "set max_sec of the stage"
            )
        self._is_small = (smallest / self._budgets).sum(axis=0).max() < _FEW_ROWS
        self._num_ways = 1 if self._is_small else min(max(_DRAWS_OF_ALL_WAYS // len(index.lengths), 2), 16)
        self._ways: list[_Way] = []
        self._row_order = functools.lru_cache(4)(self._row_order)
        self._lock = threading.Lock()

    def row(self, i: int) -> list[Draw]:
        """The i-th row."""
        with self._lock:
            epoch, i = self._find(i)
            way = self._ways[epoch % self._num_ways]
            r = self._row_order(epoch)[i]
        part = slice(way.start_R[r], way.start_R[r + 1])
        columns = (way.clip_N[part].tolist(), way.reference_N[part].tolist(), way.described_N[part].tolist())
        return [Draw(*draw) for draw in zip(*columns)]

    def heard(self, num_rows: int) -> np.ndarray:
        """[modes, 2]: clips and patches of the first rows."""
        with self._lock:
            epoch, i = self._find(num_rows)
            cycles, last = divmod(epoch, self._num_ways)
            total = self._ways[last].heard_RK2[self._row_order(epoch)[:i]].sum(axis=0)
            for way, heard in enumerate(way.heard_RK2.sum(axis=0) for way in self._ways):
                total = total + heard * (cycles + (way < last))
            return total

    def _find(self, i: int) -> tuple[int, int]:
        """Row i of all -> (epoch, row of that epoch)."""
        first = 0
        for way in range(self._num_ways):
            if way == len(self._ways):
                self._ways.append(self._pack_in_turn() if self._is_small else self._pack(way))
            num_rows = self._ways[way].num_rows
            if i < first + num_rows:
                return way, i - first
            first += num_rows
        cycles, i = divmod(i, first)
        way, i = self._find(i)
        return cycles * self._num_ways + way, i

    def _row_order(self, epoch: int) -> np.ndarray:
        num_rows = self._ways[epoch % self._num_ways].num_rows
        if self._is_small:
            return np.arange(num_rows)
        return np.random.default_rng((*self._seed, 1, epoch)).permutation(num_rows)

    def _pack(self, way: int) -> _Way:
        rng = np.random.default_rng((*self._seed, 0, way))
        clip_N, reference_N, described_N, sizes_N4 = self._draw(rng)
        order, starts, first = [], [np.zeros(1, np.int64)], 0
        for window in np.array_split(np.arange(len(clip_N)), math.ceil(len(clip_N) / packing.WINDOW_CLIPS)):
            row_N, num_rows = packing.share_rows(sizes_N4[window] / self._budgets)
            order.append(window[np.argsort(row_N, kind="stable")])
            starts.append(first + np.cumsum(np.bincount(row_N, minlength=num_rows)))
            first += len(window)
        return self._way(clip_N, reference_N, described_N, np.concatenate(order), np.concatenate(starts))

    def _pack_in_turn(self) -> _Way:
        """Epochs one after the other until there are rows enough; the last row of all may stay short."""
        parts, rows = [], 0.0
        while rows < _FEW_ROWS and len(parts) < 512:
            rng = np.random.default_rng((*self._seed, 0, len(parts)))
            parts.append(self._draw(rng))
            rows += (parts[-1][-1] / self._budgets).sum(axis=0).max()
        clip_N, reference_N, described_N, sizes_N4 = (np.concatenate(column) for column in zip(*parts))
        start_R = packing.in_turn(sizes_N4, self._budgets)
        return self._way(clip_N, reference_N, described_N, np.arange(len(clip_N)), start_R)

    def _draw(self, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All clips once, in a new order, with modes -> (clip_N, reference_N, described_N, sizes_N4)."""
        clip_N = rng.permutation(self._clips)
        lengths = self._index.lengths[clip_N]
        described_N = (lengths[:, DESCRIBED] > 0) & (rng.random(len(clip_N)) < self._stage.described)
        reference_N = np.where(lengths[:, REFERENCE] > 0, OWN_REFERENCE, NO_REFERENCE).astype(np.int32)
        if self._index.pairs is not None:
            pairs = self._index.pairs[clip_N]  # -1 behind the last
            count_N = (pairs >= 0).sum(axis=1)
            pick_N = (rng.random(len(clip_N)) * count_N).astype(np.int64)
            partner_N = np.take_along_axis(pairs, pick_N[:, None], axis=1)[:, 0]
            reference_N = np.where((reference_N == NO_REFERENCE) & (count_N > 0), partner_N, reference_N)
        wanted_N = (rng.random(len(clip_N)) < self._stage.reference) & (lengths[:, IS_PROMPT] == 0)
        reference_N[~wanted_N] = NO_REFERENCE
        sizes_N4 = self._sizes(lengths, reference_N, described_N)
        for mode_N, off in ((reference_N, NO_REFERENCE), (described_N, False)):  # what fits no row goes without
            mode_N[(sizes_N4 > self._budgets).any(axis=1)] = off
            sizes_N4 = self._sizes(lengths, reference_N, described_N)
        return clip_N, reference_N, described_N, sizes_N4

    def _sizes(self, lengths, reference_N, described_N) -> np.ndarray:
        patches_N = np.where(reference_N == OWN_REFERENCE, lengths[:, REFERENCE], 0)
        is_pair_N = reference_N >= 0
        patches_N[is_pair_N] = self._index.lengths[reference_N[is_pair_N], PATCHES]
        return _and_one_clip(packing.sizes(lengths, reference_N=patches_N, is_described=described_N))

    def _way(self, clip_N, reference_N, described_N, order, start_R) -> _Way:
        clip_N, reference_N, described_N = clip_N[order], reference_N[order], described_N[order]
        mode_N = described_N + 2 * (reference_N != NO_REFERENCE)
        mode_N[self._index.lengths[clip_N, IS_PROMPT] > 0] = MODES.index("prompt")
        num_rows, num_modes = len(start_R) - 1, len(MODES)
        place_N = np.repeat(np.arange(num_rows), np.diff(start_R)) * num_modes + mode_N
        clips, patches = (
            np.bincount(place_N, weights, minlength=num_rows * num_modes)
            for weights in (None, self._index.lengths[clip_N, PATCHES])
        )
        heard_RK2 = np.stack([clips, patches], axis=-1).astype(np.int64).reshape(num_rows, num_modes, 2)
        return _Way(clip_N, reference_N, described_N, start_R, heard_RK2)
