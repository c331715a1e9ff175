"""Clips that share rows: what a clip takes of a row, which go together, and rows put together as a batch.

A row has four budgets: T slots, M audio patches, how many of them may bear loss, and clips. A clip is never cut.

Where rows hold many clips they are dealt out: the longest first, to the rows that are least full. That fills rows
evenly, over 98 % of their slots (README), a million clips a second. Rows of few clips are filled by best fit, each clip
in turn going into the open row where it leaves least of the budget that is then fullest. mixing.py says which clips are
packed together, and when they are heard.

numpy only, so that a plan can be made anywhere.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from voxcpm2_jax.sequence import Batch, lay_out, lay_out_prompt_clip, pack

WINDOW_CLIPS = 16384  # packed together
_DEALT_CLIPS_A_ROW = 24  # rows of fewer clips are filled by best fit
_DEALT_AT_ONCE = 4  # one in this many rows gets a clip; as full as one clip at a time, and five times as fast
_OPEN_ROWS = 64  # best fit offers a clip to this many rows: those opened last, among which nearly all of the room is
_SLACK = 1e-9  # of summed fractions


# ---- clips -----------------------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """One clip as it is stored."""

    text_ids: np.ndarray  # int32 [N]
    patches_MPC: np.ndarray  # float32 latents of the clip
    reference_MPC: np.ndarray | None = None  # latents of another recording of the voice, if the corpus gives one
    described_ids: np.ndarray | None = None  # int32: "(description)text"
    is_prompt: bool = False  # only listened to: bears no loss
    text: str = ""
    description: str | None = None
    dataset: str | None = None
    language: str | None = None
    speaker: str | None = None
    session: str | None = None


class Index(NamedTuple):
    """What is known of every clip without reading it."""

    lengths: np.ndarray  # int32 [clips, 6]; columns below
    groups: tuple[tuple[str, str], ...]  # dataset and language
    pairs: np.ndarray | None = None  # int32 [clips, k]: other clips of the voice that may be a clip's reference; -1: none


TEXT, PATCHES, REFERENCE, IS_PROMPT, DESCRIBED, GROUP = range(6)
"""Columns of `lengths`: text tokens; patches; patches of the clip's own reference (0: none); whether it is a prompt clip;
tokens of description and text together (0: no description); which of the groups."""

NO_REFERENCE, OWN_REFERENCE = -1, -2

MODES = ("zero-shot", "described", "reference", "described reference", "prompt")
"""How a clip is laid out."""


class Draw(NamedTuple):
    """A clip of a row and how it is laid out."""

    clip: int
    reference: int = NO_REFERENCE  # clip whose audio goes in front, or OWN_REFERENCE
    is_described: bool = False


class Source(Protocol):
    """What a plan and a batch need of a corpus: pipeline.Shards and Synthetic have it."""

    index: Index
    patch_shape: tuple[int, int]  # (P, C)
    patch_sec: float

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...


def sizes(lengths: np.ndarray, *, reference_N=None, is_described=None) -> np.ndarray:
    """What each clip takes of three budgets, int [clips, 3]: slots, patches, target patches (see sequence.py).

    Args:
        lengths: of an Index.   reference_N: patches of the reference in front of it, 0 for none; None: its own.
        is_described: whether the description is read; None: wherever there is one.
    """
    text, described, patches = lengths[:, TEXT], lengths[:, DESCRIBED], lengths[:, PATCHES]
    is_prompt = lengths[:, IS_PROMPT] > 0
    reference = np.where(is_prompt, 0, lengths[:, REFERENCE] if reference_N is None else reference_N)
    is_described = (described > 0) & (True if is_described is None else is_described)
    slots = np.where(is_described, described, text) + patches + 2 + np.where(reference > 0, reference + 2, 0)
    return np.stack([slots, patches + reference, np.where(is_prompt, 0, patches)], axis=1).astype(np.int64)


def recommend_patches(sizes_N3: np.ndarray, num_slots: int, column: int = 1) -> int:
    """The M that suits T = num_slots: what a row of average clips holds and one standard deviation of it, in eights.

    Args:
        sizes_N3: see `sizes`.   column: 1 for M, 2 for the target patches of a row.
    """
    slots, patches = sizes_N3[:, 0], sizes_N3[:, column]
    ratio = patches.sum() / slots.sum()
    deviation = np.std(patches - ratio * slots) * math.sqrt(num_slots / slots.mean())
    wanted = max(min(num_slots * ratio + deviation, num_slots), patches.max(initial=1))
    return 8 * math.ceil(wanted / 8)


# ---- rows ------------------------------------------------------------------------------------------------------------


def share_rows(fractions_NK: np.ndarray) -> tuple[np.ndarray, int]:
    """The row of each item, and the number of rows; an item takes `fractions` of each budget of a row."""
    total = fractions_NK.sum(axis=0).max()
    if len(fractions_NK) < _DEALT_CLIPS_A_ROW * total:
        return _best_fit(fractions_NK)
    longest_first = np.argsort(-fractions_NK.max(axis=1), kind="stable")
    fewest = math.ceil(total)
    for num_rows in range(fewest, math.floor(1.05 * fewest + 1) + 1):
        dealt_N = _deal(fractions_NK[longest_first], num_rows)
        if dealt_N is not None:
            row_N = np.zeros_like(dealt_N)
            row_N[longest_first] = dealt_N
            return row_N, num_rows
    return _best_fit(fractions_NK)


def _deal(fractions_NK: np.ndarray, num_rows: int) -> np.ndarray | None:
    """Deals items, the longest first, to a given number of rows -> the row of each; None if a row overflows."""
    row_N = np.zeros(len(fractions_NK), np.int64)
    load_RK = np.zeros((num_rows, fractions_NK.shape[1]))
    fullest_R = np.zeros(num_rows)  # of a row's budgets
    at_once = max(1, num_rows // _DEALT_AT_ONCE)
    for start in range(0, len(fractions_NK), at_once):
        items_NK = fractions_NK[start : start + at_once]
        rows = np.argsort(fullest_R, kind="stable")[: len(items_NK)]
        load_RK[rows] += items_NK
        fullest_R[rows] = load_RK[rows].max(axis=1)
        row_N[start : start + at_once] = rows
        if fullest_R[rows].max() > 1 + _SLACK:
            return None
    return row_N


def _best_fit(fractions_NK: np.ndarray) -> tuple[np.ndarray, int]:
    """Each item into the open row where it leaves least of the budget that is then fullest -> as `share_rows`."""
    row_N = np.zeros(len(fractions_NK), np.int64)
    num_rows = 0
    room_RK = np.zeros((0, fractions_NK.shape[1]))  # of the open rows
    open_rows = np.zeros(0, np.int64)
    smallest_K = fractions_NK.min(axis=0)
    for item, fraction_K in enumerate(fractions_NK):
        tightest_R = (room_RK - fraction_K).min(axis=1)
        fits_R = tightest_R >= -_SLACK
        if fits_R.any():
            r = int(np.where(fits_R, tightest_R, np.inf).argmin())
        else:
            full_R = (room_RK < smallest_K - _SLACK).any(axis=1)
            keep = np.flatnonzero(~full_R)[-_OPEN_ROWS + 1 :]
            room_RK = np.concatenate([room_RK[keep], np.ones((1, room_RK.shape[1]))])
            open_rows = np.append(open_rows[keep], num_rows)
            num_rows += 1
            r = len(open_rows) - 1
        room_RK[r] -= fraction_K
        row_N[item] = open_rows[r]
    return row_N, num_rows


def in_turn(sizes_N3: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Rows filled one after the other with the items in their order -> the first item of each row, and their number."""
    assert (sizes_N3 <= budgets).all()
    before_3N = np.cumsum(np.pad(sizes_N3, ((1, 0), (0, 0))), axis=0).T
    starts = [0]
    while starts[-1] < len(sizes_N3):
        full_3 = before_3N[:, starts[-1]] + budgets
        starts.append(min(int(np.searchsorted(*pair, side="right")) - 1 for pair in zip(before_3N, full_3)))
    return np.array(starts)


# ---- batch -----------------------------------------------------------------------------------------------------------


def assemble(source: Source, rows: Sequence[Sequence[Draw]], *, num_slots: int, num_patches: int) -> Batch:
    """The batch whose row i holds the draws rows[i]."""
    laid_out = [[lay_out_draw(source, draw) for draw in row] for row in rows]
    labels = [[label(source.index, draw) for draw in row] for row in rows]
    return pack(laid_out, num_slots=num_slots, num_patches=num_patches, patch_shape=source.patch_shape, labels=labels)


def label(index: Index, draw: Draw) -> int:
    """The number of a draw's dataset, language and mode: group x modes + mode."""
    lengths = index.lengths[draw.clip]
    if lengths[IS_PROMPT]:
        mode = MODES.index("prompt")
    else:
        mode = draw.is_described + 2 * (draw.reference != NO_REFERENCE)
    return int(lengths[GROUP]) * len(MODES) + mode


def label_names(index: Index) -> list[tuple[str, str, str]]:
    """(dataset, language, mode) by the numbers that `label` gives."""
    return [(*group, mode) for group in index.groups for mode in MODES]


def label_patches(index: Index) -> np.ndarray:
    """How many patches that bear loss can come under each label."""
    lengths = index.lengths
    is_target_N, is_described_N = lengths[:, IS_PROMPT] == 0, lengths[:, DESCRIBED] > 0
    has_reference_N = lengths[:, REFERENCE] > 0
    if index.pairs is not None:
        has_reference_N |= (index.pairs >= 0).any(axis=1)
    of_modes = (True, is_described_N, has_reference_N, is_described_N & has_reference_N, False)
    patches = [
        np.bincount(lengths[:, GROUP], lengths[:, PATCHES] * (is_target_N & is_of_mode), minlength=len(index.groups))
        for is_of_mode in of_modes
    ]
    return np.stack(patches, axis=1).ravel()


def lay_out_draw(source: Source, draw: Draw):
    """A draw's sequence: prompt clip, reference cloning or zero-shot, with description or without."""
    clip = source[draw.clip]
    ids = clip.described_ids if draw.is_described else clip.text_ids
    if clip.is_prompt:
        return lay_out_prompt_clip(ids, clip.patches_MPC)
    reference_MPC = None
    if draw.reference != NO_REFERENCE:
        own = draw.reference == OWN_REFERENCE
        reference_MPC = clip.reference_MPC if own else source[draw.reference].patches_MPC
    return lay_out(ids, reference_MPC=reference_MPC, target_MPC=clip.patches_MPC)
