"""Which clips share a row. mixing.py decides which clips are packed together and when the model sees them.

A row has four budgets (`Budgets`): slots, audio patches, patches that bear loss, and clips. A clip is never cut.

Two methods fill rows:

    deal        where rows hold many clips: the longest clips first, each to the row that is least full; over 98 % of the
                slots are used, about a million clips are packed per second (tests/measure_mixing.py)
    best fit    where rows hold few: each clip goes into the open row where it leaves the least room; about as fast

Needs only numpy.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from voxcpm2_jax.config.run import BatchConfig

WINDOW_CLIPS = 16384  # clips that are packed together
_DEAL_FROM_CLIPS_PER_ROW = 24  # rows of fewer clips are filled by best fit
_DEAL_ROWS_AT_ONCE = 4  # 1 in 4 rows gets a clip at a time: as full as one row at a time, and five times as fast
_OPEN_ROWS = 64  # best fit looks at the rows opened last, which have nearly all of the room
_WINDOWS_AT_ONCE = 128  # by best fit; more are hardly faster
_SLACK = 1e-9  # rounding of summed fractions

SLOTS, PATCHES, TARGETS, CLIPS = range(4)  # columns of `sizes`, in the order of Budgets


class Budgets(NamedTuple):
    """What a row can hold."""

    slots: int
    patches: int
    targets: int  # patches that bear loss
    clips: float = math.inf


def budgets_of(batch: BatchConfig) -> Budgets:
    """The budgets of a row of the config."""
    return Budgets(batch.slots, batch.patches, batch.target_patches or batch.patches, batch.segments or math.inf)


def largest_clip(batch: BatchConfig) -> Budgets:
    """What a single clip may take of a row."""
    return budgets_of(batch)._replace(slots=min(batch.slots, batch.clip_slots or batch.slots))


def sizes(lengths: np.ndarray, *, reference_patches=None, is_described=None) -> np.ndarray:
    """How much each clip takes of the four budgets, int64 [clips, 4]; see sequence.py for the layouts.

    Args:
        lengths: LENGTHS [clips].
        reference_patches: [clips], patches of the reference clip in front of each clip, 0 for none; None: those of its own.
        is_described: [clips], whether the description is used; None: wherever there is one.
    """
    patches, is_prompt = lengths["patches"], lengths["is_prompt"] > 0
    reference = np.where(is_prompt, 0, lengths["reference"] if reference_patches is None else reference_patches)
    is_described = (lengths["described"] > 0) & (True if is_described is None else is_described)
    text = np.where(is_described, lengths["described"], lengths["text"])
    slots = text + patches + 2 + np.where(reference > 0, reference + 2, 0)
    targets = np.where(is_prompt, 0, patches)
    return np.stack([slots, patches + reference, targets, np.ones_like(patches)], axis=1).astype(np.int64)


def recommend_patches(clip_sizes: np.ndarray, num_slots: int) -> int:
    """The M that suits T = num_slots: the patches of a row of average clips plus one standard deviation, in eights.

    Args:
        clip_sizes: of `sizes`.
    """
    slots, patches = clip_sizes[:, SLOTS], clip_sizes[:, PATCHES]
    ratio = patches.sum() / slots.sum()
    deviation = np.std(patches - ratio * slots) * math.sqrt(num_slots / slots.mean())
    wanted = max(min(num_slots * ratio + deviation, num_slots), patches.max(initial=1))
    return 8 * math.ceil(wanted / 8)


def share_rows(fractions: np.ndarray) -> tuple[np.ndarray, int]:
    """Packs items into rows -> the row of each item, and the number of rows.

    Args:
        fractions: [items, budgets], the fraction of each budget of a row that an item takes.
    """
    return next(share_windows([fractions]))


def share_windows(windows: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """`share_rows` of each of some windows, faster than one after the other."""
    windows = iter(windows)
    while some := list(itertools.islice(windows, _WINDOWS_AT_ONCE)):
        packed = [_dealt(fractions) for fractions in some]
        left = [i for i, found in enumerate(packed) if found is None]
        for i, found in zip(left, _best_fit([some[i] for i in left]) if left else ()):
            packed[i] = found
        yield from packed


def _dealt(fractions: np.ndarray) -> tuple[np.ndarray, int] | None:
    """One window dealt to as few rows as possible; None if rows hold few items, or full ones would be 5 % fewer."""
    total = fractions.sum(axis=0).max()
    if len(fractions) < _DEAL_FROM_CLIPS_PER_ROW * total:
        return None
    longest_first = np.argsort(-fractions.max(axis=1), kind="stable")
    fewest = math.ceil(total)
    for num_rows in range(fewest, math.floor(1.05 * fewest + 1) + 1):
        dealt = _deal(fractions[longest_first], num_rows)
        if dealt is not None:
            rows = np.zeros_like(dealt)
            rows[longest_first] = dealt
            return rows, num_rows
    return None


def _deal(fractions: np.ndarray, num_rows: int) -> np.ndarray | None:
    """Deals items, sorted by falling size, to a fixed number of rows -> the row of each; None if a row overflows."""
    row_of_item = np.zeros(len(fractions), np.int64)
    loads = np.zeros((num_rows, fractions.shape[1]))
    fullest = np.zeros(num_rows)  # the largest load of each row
    at_once = max(1, num_rows // _DEAL_ROWS_AT_ONCE)
    for start in range(0, len(fractions), at_once):
        items = fractions[start : start + at_once]
        rows = np.argsort(fullest, kind="stable")[: len(items)]
        loads[rows] += items
        fullest[rows] = loads[rows].max(axis=1)
        row_of_item[start : start + at_once] = rows
        if fullest[rows].max() > 1 + _SLACK:
            return None
    return row_of_item


def _best_fit(windows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, int]]:
    """Puts each item into the open row where it leaves the least of the budget that is then fullest -> as `share_rows`.

    All windows place their next item at the same time, because numpy is slow on small arrays. Each has `_OPEN_ROWS` places for
    open rows, the first opened first; -inf marks a place without a row.
    """
    binding, num_windows = _binding(windows), len(windows)
    items = np.zeros((max(map(len, windows)), len(binding), num_windows))  # zeros after the end of a window do no harm
    for w, window in enumerate(windows):
        items[: len(window), :, w] = window[:, binding]
    smallest = np.stack([window[:, binding].min(axis=0) for window in windows], axis=1)[..., None]
    room = np.full((len(binding), num_windows, _OPEN_ROWS), -np.inf)
    room_left, least, is_too_small = np.empty_like(room), np.empty(room.shape[1:]), np.empty(room.shape[1:], bool)
    number = np.zeros((num_windows, _OPEN_ROWS), np.int64)  # of the row at each place
    places = np.zeros(num_windows, np.int64)  # that are taken
    num_rows = np.zeros(num_windows, np.int64)
    row_of_item = np.zeros((len(items), num_windows), np.int64)
    first_place = np.arange(num_windows) * _OPEN_ROWS
    room_flat, least_flat, number_flat = room.reshape(len(binding), -1), least.reshape(-1), number.reshape(-1)
    for i, item in enumerate(items):
        np.subtract(room, item[..., None], out=room_left).min(axis=0, out=least)
        np.copyto(least, np.inf, where=np.less(least, -_SLACK, out=is_too_small))
        place = least.argmin(axis=1)
        place += first_place
        new = (least_flat[place] == np.inf).nonzero()[0]  # windows in which it fits no open row
        if len(new):
            for w in new[places[new] == _OPEN_ROWS].tolist():
                keep = np.flatnonzero((room[:, w] >= smallest[:, w] - _SLACK).all(axis=0))[-_OPEN_ROWS + 1 :]
                places[w] = len(keep)
                room[:, w, : len(keep)], number[w, : len(keep)] = room[:, w, keep], number[w, keep]
                room[:, w, len(keep) :] = -np.inf
            place[new] = first_place[new] + places[new]
            room_flat[:, place[new]] = 1.0
            number_flat[place[new]] = num_rows[new]
            places[new] += 1
            num_rows[new] += 1
        room_flat[:, place] -= item
        row_of_item[i] = number_flat[place]
    return [(row_of_item[: len(window), w], int(num_rows[w])) for w, window in enumerate(windows)]


def _binding(windows: Sequence[np.ndarray]) -> list[int]:
    """The budgets that decide: not those of which every item takes no more than of another one."""
    budgets = list(range(windows[0].shape[1]))
    for budget in reversed(budgets):
        others = [other for other in budgets if other != budget]
        if any(all((window[:, budget] <= window[:, other]).all() for window in windows) for other in others):
            budgets = others
    return budgets


def fill_in_turn(item_sizes: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Fills rows one after the other, keeping the order of the items -> the first item of each row, then their number.

    Args:
        item_sizes: [items, budgets].
    """
    assert (item_sizes <= budgets).all()
    before = np.cumsum(np.pad(item_sizes, ((1, 0), (0, 0))), axis=0).T  # [budgets, items + 1]
    starts = [0]
    while starts[-1] < len(item_sizes):
        full = before[:, starts[-1]] + budgets
        starts.append(min(int(np.searchsorted(*pair, side="right")) - 1 for pair in zip(before, full)))
    return np.array(starts)
