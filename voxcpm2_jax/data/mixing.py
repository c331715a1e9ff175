"""Which clips the model sees when: the clips of every row of every step, a pure function of (seed, index, stages).

    group     the clips of one dataset and language; prompt clips form groups of their own
    stage     sets, from its first step on, which clip lengths are used, the shares of groups and of modes (how clips are
              laid out, clips.py), and the budgets of a row
    stream    the endless sequence of rows of a group, epoch after epoch: no clip comes twice before all came once

All clips of a row belong to one group; a batch mixes rows. Row i of a stage is assigned to a group, in such an order that
every block of rows holds each group by its share; it is the next row of that group's stream. Any step is found by arithmetic
and costs no more than the first, once the packings that it needs are made. What the model was trained on before a step is
counted without a walk through the steps.

    large group   packed in 2 to 16 different ways; epoch i uses packing i modulo that number, its rows in an order of its own
    small group   many epochs packed one after the other across their borders, so that no row stays half empty

Needs only numpy.
"""

import functools
import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.run import BatchConfig, StageConfig
from voxcpm2_jax.data import packing
from voxcpm2_jax.data.clips import MODES, NO_REFERENCE, OWN_REFERENCE, Draw, Index
from voxcpm2_jax.data.packing import Budgets

_MAX_DRAWS = 1 << 23  # in the packings of all groups together: bounds time and memory
_FEW_ROWS = 64  # per epoch: a group with fewer is small
_BLOCK_ROWS = 1024  # every block of this many rows holds each group by its share, to one row


class Mix:
    """The rows of every step.

    Args:
        seed: of all orders and choices.   index: of the corpus.   patch_sec: seconds of a patch.
        batch: the run's budgets; a stage uses multiples of them.   stages: none: all clips, in proportion to their hours.
    Raises:
        UserError: no stage from step 0 on, a stage without clips, a clip that fits no row, a weight or a share for clips
            that the corpus does not have.
    """

    def __init__(self, seed: int, index: Index, patch_sec: float, batch: BatchConfig, stages: Sequence[StageConfig] = ()):
        self._index = index
        stages = sorted(stages or [StageConfig()], key=lambda stage: stage.first_step)
        if stages[0].first_step:
            raise UserError(f"stages: expected one from step 0 on; the first begins at step {stages[0].first_step}")
        if len({stage.first_step for stage in stages}) < len(stages):
            raise UserError(f"stages: two begin at one step; they begin at {', '.join(str(s.first_step) for s in stages)}")
        self._stages: list[Stage] = []
        streams: dict[tuple, _Stream] = {}
        used: dict[tuple, int] = {}  # rows of each stream that earlier stages took
        for i, config in enumerate(stages):
            batch_of_stage = config.batch_of(batch)
            budgets, largest = packing.budgets_of(batch_of_stage), packing.largest_clip(batch_of_stage)
            if self._stages:
                last = self._stages[-1]
                rows = (config.first_step - last.first_step) * last.batch.rows
                used |= {key: offset + n for key, offset, n in zip(last.keys, last.offsets, last.order.before(rows))}
            groups = _groups(index, config, patch_sec)
            keys, new = [], _Together()
            for group, (clips, _) in groups.items():
                # A stage continues the epochs of an earlier one if it wants the same of the group; otherwise it begins anew.
                key = (group, config.min_sec, config.max_sec, config.reference, config.described, *budgets, *largest[:1])
                if key not in streams:
                    streams[key] = _Stream((seed, len(streams)), index, clips, config, budgets, largest, new)
                keys.append(key)
            new.measure()
            # The shares are of hours. A group with much text, many reference clips or clips that leave rows half empty needs
            # more rows for an hour.
            rows = np.array([hours * streams[key].rows_per_patch for key, (_, hours) in zip(keys, groups.values())])
            self._stages.append(
                Stage(
                    config=config,
                    first_step=config.first_step,
                    batch=batch_of_stage,
                    groups=tuple(group // 2 for group in groups),
                    keys=tuple(keys),
                    streams=tuple(streams[key] for key in keys),
                    offsets=tuple(used.get(key, 0) for key in keys),
                    order=_Interleaving((seed, i), rows / rows.sum()),
                )
            )

    @property
    def stages(self) -> tuple["Stage", ...]:
        """The stages, in the order of their steps."""
        return tuple(self._stages)

    def batch_of(self, step: int) -> BatchConfig:
        """The budgets of a step."""
        return self._stage(step).batch

    def rows(self, step: int, some: Sequence[int] | None = None) -> list[list[Draw]]:
        """The draws of each row of a step, or of some of its rows by number."""
        stage = self._stage(step)
        first = (step - stage.first_step) * stage.batch.rows
        found = [stage.order.at(first + row) for row in (range(stage.batch.rows) if some is None else some)]
        return [stage.streams[group].row(stage.offsets[group] + n) for group, n in found]

    def heard(self, step: int) -> dict[tuple[str, str, str], tuple[int, int]]:
        """What the model was trained on before a step: (dataset, language, mode) -> (clips, patches); no reference clips."""
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

    def _stage(self, step: int) -> "Stage":
        return [stage for stage in self._stages if stage.first_step <= step][-1]


class Stage(NamedTuple):
    """A stage, resolved; the tuples have one entry per group."""

    config: StageConfig
    first_step: int
    batch: BatchConfig
    groups: tuple[int, ...]
    keys: tuple[tuple, ...]  # group and the options that its stream depends on
    streams: tuple["_Stream", ...]
    offsets: tuple[int, ...]  # rows of the stream that earlier stages took
    order: "_Interleaving"


# ---- shares ----------------------------------------------------------------------------------------------------------


def _groups(index: Index, stage: StageConfig, patch_sec: float) -> dict[int, tuple[np.ndarray, float]]:
    """The groups of a stage: 2 x group, + 1 for its prompt clips -> (clips, share of the hours, not normalised)."""
    sec = index.lengths["patches"] * patch_sec
    chosen = np.flatnonzero((sec >= stage.min_sec) & (sec <= (math.inf if stage.max_sec is None else stage.max_sec)))
    if not len(chosen):
        raise UserError(f"the stage from step {stage.first_step} has no clips of {stage.min_sec} to {stage.max_sec} s")
    names = {name for group in index.groups for name in (*group, "/".join(group))}
    unknown = sorted({name for name, _ in stage.weights} - names)
    if unknown:
        raise UserError(f"weights: no {', '.join(unknown)} in this corpus; it has {', '.join(sorted(names))}")
    key_of_clip = 2 * index.lengths["group"][chosen] + (index.lengths["is_prompt"][chosen] > 0)
    clips = {int(key): chosen[key_of_clip == key].astype(np.int32) for key in np.unique(key_of_clip)}
    weight = {}
    for key, members in clips.items():
        group = index.groups[key // 2]
        factor = math.prod(factor for name, factor in stage.weights if name in (*group, "/".join(group)))
        patches = index.lengths["patches"][members].sum()
        weight[key] = factor * float(patches) ** (1 / stage.temperature)
    if stage.prompt is not None:
        for is_prompt, share in ((1, stage.prompt), (0, 1 - stage.prompt)):
            keys = [key for key in weight if key % 2 == is_prompt]
            total = sum(weight[key] for key in keys)
            if share and not total:
                kind = "prompt clips" if is_prompt else "clips that bear loss"
                raise UserError(f"the stage from step {stage.first_step}: a share of {share} for {kind}, but there are none")
            weight |= {key: weight[key] / total * share for key in keys if total}
    if not sum(weight.values()):
        raise UserError(f"the stage from step {stage.first_step}: all weights are 0")
    return {key: (clips[key], weight[key]) for key in clips if weight[key] > 0}


class _Interleaving:
    """An endless sequence of groups. Each stretch of it holds every group by its share."""

    def __init__(self, seed, shares: np.ndarray):
        self._seed, self._shares = seed, shares
        # The largest group takes the rows that the others leave; in a block of this size they always leave some.
        self._block_rows = max(_BLOCK_ROWS, len(shares) ** 2)
        self._phases = np.random.default_rng(seed).random(len(shares))
        self._block = functools.lru_cache(8)(self._block)

    def at(self, i: int) -> tuple[int, int]:
        """The group of row i, and how many rows of that group come before it."""
        block, i = divmod(i, self._block_rows)
        order, rank = self._block(block)
        return int(order[i]), int(rank[i])

    def before(self, i: int) -> np.ndarray:
        """[groups]: how many of the first i rows belong to each group."""
        block, i = divmod(i, self._block_rows)
        counts = self._before_block(block)
        return counts + np.bincount(self._block(block)[0][:i], minlength=len(counts)) if i else counts

    def _before_block(self, block: int) -> np.ndarray:
        counts = np.floor(block * self._block_rows * self._shares + self._phases).astype(np.int64)
        largest = self._shares.argmax()
        counts[largest] += block * self._block_rows - counts.sum()
        return counts

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The group of every row of a block, and how many rows of that group come before it."""
        before = self._before_block(block)
        counts = self._before_block(block + 1) - before
        order = np.random.default_rng((*self._seed, block)).permutation(np.repeat(np.arange(len(counts)), counts))
        rank = np.zeros(len(order), np.int64)
        for group in range(len(counts)):
            rank[order == group] = before[group] + np.arange(counts[group])
        return order, rank


# ---- one group's rows ------------------------------------------------------------------------------------------------


class _Draws(NamedTuple):
    """Draws as columns: each field holds one entry per draw."""

    clip: np.ndarray
    reference: np.ndarray
    is_described: np.ndarray

    def take(self, order) -> "_Draws":
        return _Draws(*(column[order] for column in self))


class _Packing(NamedTuple):
    """Packed rows: row r holds the draws starts[r] .. starts[r + 1] - 1."""

    draws: _Draws
    starts: np.ndarray  # [rows + 1]
    heard: np.ndarray  # [rows, modes, 2]: clips and patches of each row by mode

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1


class _Stream:
    """The endless sequence of packed rows of some clips, with random access; safe to share between threads.

    Attributes:
        rows_per_patch: what a patch of a clip takes of a row, room that stays empty included; set by `_Together.measure`.
    """

    rows_per_patch: float

    def __init__(
        self,
        seed,
        index: Index,
        clips: np.ndarray,
        stage: StageConfig,
        budgets: Budgets,
        largest: Budgets,
        together: "_Together",
    ):
        self._seed, self._index, self._clips, self._stage = seed, index, clips, stage
        self._budgets, self._largest = np.array(budgets), np.array(largest)
        smallest = packing.sizes(index.lengths.take(clips), reference_patches=0, is_described=False)
        too_big = np.flatnonzero((smallest > self._largest).any(axis=1))
        if len(too_big):
            slots, patches, targets, _ = smallest[too_big].max(axis=0)
            raise UserError(
                f"{len(too_big)} of {len(clips)} clips take more than {largest.slots} slots, {largest.patches} patches or "
                f"{largest.targets} target patches; the largest take {slots}, {patches} and {targets}: raise the budgets "
                "(clip_slots, slots, patches, target_patches) or set max_sec of the stage"
            )
        self.is_small = (smallest / self._budgets).sum(axis=0).max() < _FEW_ROWS
        self._num_packings = 1 if self.is_small else min(max(_MAX_DRAWS // len(index.lengths), 2), 16)
        self._packings: list[_Packing] = []  # made when they are first needed
        self._row_order = functools.lru_cache(4)(self._row_order)
        self._together, self._lock = together, together.lock
        together.streams.append(self)

    @property
    def clips(self) -> np.ndarray:
        """Numbers of the clips, each once."""
        return self._clips

    def sample(self, together: "_Together") -> "_Stream":
        """A stream of one window of its clips."""
        clips = np.random.default_rng((*self._seed, 2)).permutation(self._clips)[: packing.WINDOW_CLIPS]
        return _Stream(
            (*self._seed, 2), self._index, clips, self._stage, Budgets(*self._budgets), Budgets(*self._largest), together
        )

    def packing(self, number: int) -> _Packing:
        """A packing by its number."""
        if number == len(self._packings):
            if self.is_small:
                self._pack_in_turn()
            else:
                self._together.pack(number)
        return self._packings[number]

    def row(self, i: int) -> list[Draw]:
        """The i-th row."""
        with self._lock:
            epoch, i = self._find(i)
            packed = self._packings[epoch % self._num_packings]
            r = self._row_order(epoch)[i]
        part = packed.draws.take(slice(packed.starts[r], packed.starts[r + 1]))
        return [Draw(*draw) for draw in zip(*(column.tolist() for column in part))]

    def heard(self, num_rows: int) -> np.ndarray:
        """[modes, 2]: clips and patches of the first rows."""
        with self._lock:
            epoch, i = self._find(num_rows)
            cycles, last = divmod(epoch, self._num_packings)
            total = self._packings[last].heard[self._row_order(epoch)[:i]].sum(axis=0)
            for number, packed in enumerate(self._packings):
                total = total + packed.heard.sum(axis=0) * (cycles + (number < last))
            return total

    def _find(self, i: int) -> tuple[int, int]:
        """Row i of the stream -> (epoch, row of that epoch)."""
        first = 0
        for number in range(self._num_packings):
            num_rows = self.packing(number).num_rows
            if i < first + num_rows:
                return number, i - first
            first += num_rows
        cycles, i = divmod(i, first)
        number, i = self._find(i)
        return cycles * self._num_packings + number, i

    def _row_order(self, epoch: int) -> np.ndarray:
        num_rows = self._packings[epoch % self._num_packings].num_rows
        if self.is_small:
            return np.arange(num_rows)
        return np.random.default_rng((*self._seed, 1, epoch)).permutation(num_rows)

    def draw(self, number: int) -> tuple[_Draws, Iterator[np.ndarray]]:
        """The draws of a packing, and what they take of a row, in windows of [draws, budgets]."""
        draws, sizes = self._draw(np.random.default_rng((*self._seed, 0, number)))
        return draws, (sizes[window] / self._budgets for window in self.windows())

    def windows(self) -> list[slice]:
        """The windows of clips that are packed together; their lengths differ by one at most."""
        count = math.ceil(len(self._clips) / packing.WINDOW_CLIPS)
        length, longer = divmod(len(self._clips), count)
        bounds = [length * i + min(i, longer) for i in range(count + 1)]
        return [slice(*pair) for pair in itertools.pairwise(bounds)]

    def add(self, draws: _Draws, found: Iterable[tuple[np.ndarray, int]]) -> None:
        """Adds a packing of these draws; `found` is what packing.share_rows returns for each window."""
        order, starts = [], [np.zeros(1, np.int64)]
        for window, (row_of_clip, num_rows) in zip(self.windows(), found):
            order.append(window.start + np.argsort(row_of_clip, kind="stable"))
            starts.append(window.start + np.cumsum(np.bincount(row_of_clip, minlength=num_rows)))
        self._packings.append(self._packed(draws.take(np.concatenate(order)), np.concatenate(starts)))

    def _pack_in_turn(self) -> None:
        """Epochs of a small group one after the other, until there are enough rows; only the very last row may stay short."""
        epochs, sizes, rows = [], [], 0.0
        while rows < _FEW_ROWS and len(epochs) < 512:
            draws, sizes_of_epoch = self._draw(np.random.default_rng((*self._seed, 0, len(epochs))))
            epochs.append(draws)
            sizes.append(sizes_of_epoch)
            rows += (sizes_of_epoch / self._budgets).sum(axis=0).max()
        draws = _Draws(*(np.concatenate(column) for column in zip(*epochs)))
        self._packings.append(self._packed(draws, packing.fill_in_turn(np.concatenate(sizes), self._budgets)))

    def _draw(self, rng) -> tuple[_Draws, np.ndarray]:
        """All clips once, in a new order and with modes drawn for them; and their `sizes`."""
        clip = rng.permutation(self._clips)
        lengths = self._index.lengths.take(clip)  # on structured arrays several times as fast as indexing
        is_described = (lengths["described"] > 0) & (rng.random(len(clip)) < self._stage.described)
        reference = np.where(lengths["reference"] > 0, OWN_REFERENCE, NO_REFERENCE).astype(np.int32)
        if self._index.pairs is not None:
            pairs = self._index.pairs[clip]  # -1 behind the last
            num_pairs = (pairs >= 0).sum(axis=1)
            pick = (rng.random(len(clip)) * num_pairs).astype(np.int64)
            partner = np.take_along_axis(pairs, pick[:, None], axis=1)[:, 0]
            reference = np.where((reference == NO_REFERENCE) & (num_pairs > 0), partner, reference)
        is_wanted = (rng.random(len(clip)) < self._stage.reference) & (lengths["is_prompt"] == 0)
        reference[~is_wanted] = NO_REFERENCE
        sizes = self._sizes(lengths, reference, is_described)
        # A clip that fits no row with its reference clip loses it; if it still fits none, it loses its description too.
        for column, off in ((reference, NO_REFERENCE), (is_described, False)):
            column[(sizes > self._largest).any(axis=1)] = off
            sizes = self._sizes(lengths, reference, is_described)
        return _Draws(clip, reference, is_described), sizes

    def _sizes(self, lengths, reference, is_described) -> np.ndarray:
        patches = np.where(reference == OWN_REFERENCE, lengths["reference"], 0)
        is_pair = reference >= 0
        patches[is_pair] = self._index.lengths["patches"][reference[is_pair]]
        return packing.sizes(lengths, reference_patches=patches, is_described=is_described)

    def _packed(self, draws: _Draws, starts: np.ndarray) -> _Packing:
        lengths = self._index.lengths
        mode = draws.is_described + 2 * (draws.reference != NO_REFERENCE)
        mode[lengths["is_prompt"][draws.clip] > 0] = MODES.index("prompt")
        num_rows, num_modes = len(starts) - 1, len(MODES)
        cell = np.repeat(np.arange(num_rows), np.diff(starts)) * num_modes + mode
        clips, patches = (
            np.bincount(cell, weights, minlength=num_rows * num_modes) for weights in (None, lengths["patches"][draws.clip])
        )
        heard = np.stack([clips, patches], axis=-1).astype(np.int64).reshape(num_rows, num_modes, 2)
        return _Packing(draws, starts, heard)


class _Together:
    """Streams of one stage. The large ones make their packings at the same time, which takes far less time."""

    def __init__(self):
        self.streams: list[_Stream] = []
        self.lock = threading.Lock()

    def pack(self, number: int) -> None:
        """Adds a packing to every large stream."""
        large, draws = [stream for stream in self.streams if not stream.is_small], []

        def windows() -> Iterator[np.ndarray]:
            for stream in large:
                of_stream, fractions = stream.draw(number)
                draws.append(of_stream)
                yield from fractions

        found = packing.share_windows(windows())
        for stream in large:
            of_stream = list(itertools.islice(found, len(stream.windows())))
            stream.add(draws.pop(0), of_stream)

    def measure(self) -> None:
        """Sets rows_per_patch of every stream, that of a large one from a window of its clips."""
        windows = _Together()
        measured = [stream if stream.is_small else stream.sample(windows) for stream in self.streams]
        for stream, packed in zip(self.streams, [stream.packing(0) for stream in measured]):
            stream.rows_per_patch = packed.num_rows / float(packed.heard[..., 1].sum())
