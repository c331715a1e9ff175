"""Which clips share a row. mixing.py decides which clips are packed together and when the model sees them.

A row has four budgets (`Budgets`): slots, audio patches, patches that bear loss, and clips. A clip is never cut.

Two methods fill rows:

    deal        where rows hold many clips: the longest clips first, each to the row that is least full; over 98 % of the
                slots are used, about a million clips are packed per second (tests/measure_mixing.py)
    best fit    where rows hold few: each clip goes into the open row where it leaves the least room

Needs only numpy.
"""

import math
from typing import NamedTuple

import numpy as np

from voxcpm2_jax.config.run import BatchConfig

WINDOW_CLIPS = 16384  # clips that are packed together
_DEAL_FROM_CLIPS_PER_ROW = 24  # rows of fewer clips are filled by best fit
_DEAL_ROWS_AT_ONCE = 4  # 1 in 4 rows gets a clip at a time: as full as one row at a time, and five times as fast
_OPEN_ROWS = 64  # best fit looks at the rows opened last, which have nearly all of the room
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
    total = fractions.sum(axis=0).max()
    if len(fractions) < _DEAL_FROM_CLIPS_PER_ROW * total:
        return _best_fit(fractions)
    longest_first = np.argsort(-fractions.max(axis=1), kind="stable")
    fewest = math.ceil(total)
    for num_rows in range(fewest, math.floor(1.05 * fewest + 1) + 1):
        dealt = _deal(fractions[longest_first], num_rows)
        if dealt is not None:
            rows = np.zeros_like(dealt)
            rows[longest_first] = dealt
            return rows, num_rows
    return _best_fit(fractions)


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


def _best_fit(fractions: np.ndarray) -> tuple[np.ndarray, int]:
    """Puts each item into the open row where it leaves the least of the budget that is then fullest -> as `share_rows`."""
    row_of_item = np.zeros(len(fractions), np.int64)
    num_rows = 0
    room = np.zeros((0, fractions.shape[1]))  # [open rows, budgets]
    open_rows = np.zeros(0, np.int64)
    smallest = fractions.min(axis=0)
    for item, fraction in enumerate(fractions):
        room_left = (room - fraction).min(axis=1)
        fits = room_left >= -_SLACK
        if fits.any():
            chosen = int(np.where(fits, room_left, np.inf).argmin())
        else:
            is_full = (room < smallest - _SLACK).any(axis=1)
            keep = np.flatnonzero(~is_full)[-_OPEN_ROWS + 1 :]
            room = np.concatenate([room[keep], np.ones((1, room.shape[1]))])
            open_rows = np.append(open_rows[keep], num_rows)
            num_rows += 1
            chosen = len(open_rows) - 1
        room[chosen] -= fraction
        row_of_item[item] = open_rows[chosen]
    return row_of_item, num_rows


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
