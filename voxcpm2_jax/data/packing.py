"""The pack plan: which clips share a row, as a pure function of (seed, lengths, budgets); and the rows put together.

    epoch -> every clip once, in a new order -> windows of 16,384 clips -> best fit into rows -> rows in a new order
    step  -> rows step * B .. step * B + B - 1 of the endless sequence of rows

A row has three budgets: T slots, M audio patches, and how many of them may bear loss. A clip is never cut, and none comes
twice before all came once. Any step can be asked for; the windows before it are packed again if they have to be (about
40,000 clips a second), of which only their number of rows is kept.

Best fit: each clip goes into the open row where it leaves least of the budget that is then fullest. In random order, over
rows of many clips, that fills 99 % of the slots (README); sorting by length first would fill no better, and would give
the same clips the same company in every epoch.

numpy only, so that a plan can be made anywhere.
"""

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from voxcpm2_jax.config import UserError
from voxcpm2_jax.sequence import Batch, lay_out, lay_out_prompt_clip, pack

WINDOW_CLIPS = 16384
_OPEN_ROWS = 64  # a clip is offered to this many rows: those opened last, among which nearly all of the room is
_KEPT_WINDOWS = 4


# ---- clips -----------------------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """One clip, ready to be laid out."""

    text_ids: np.ndarray  # int32 [N], description included
    patches_MPC: np.ndarray  # float32 latents of the clip
    reference_MPC: np.ndarray | None = None  # latents of another recording of the voice
    is_prompt: bool = False  # only listened to: bears no loss
    text: str = ""
    description: str | None = None
    dataset: str | None = None
    language: str | None = None
    speaker: str | None = None
    session: str | None = None


# Columns of `lengths`, the sizes a plan is made from without reading a clip.
TEXT, PATCHES, REFERENCE, IS_PROMPT = range(4)


class Source(Protocol):
    """What a plan and a batch need of a corpus: pipeline.Shards and Synthetic have it."""

    lengths: np.ndarray  # int32 [clips, 4]: text tokens, patches, reference patches (0: none), is_prompt
    patch_shape: tuple[int, int]  # (P, C)
    patch_sec: float

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...


def sizes(lengths: np.ndarray) -> np.ndarray:
    """What each clip takes of the three budgets, int [clips, 3]: slots, patches, target patches (see sequence.py)."""
    text, patches, reference = lengths[:, TEXT], lengths[:, PATCHES], lengths[:, REFERENCE]
    is_prompt = lengths[:, IS_PROMPT] > 0
    reference = np.where(is_prompt, 0, reference)
    slots = text + patches + 2 + np.where(reference > 0, reference + 2, 0)
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


# ---- plan ------------------------------------------------------------------------------------------------------------


class PackPlan:
    """Which clips make up the rows of every step.

    Args:
        seed: of the order.   sizes_N3: see `sizes`.
        num_rows: B.   num_slots: T.   num_patches: M.   target_patches: third budget; None: M.
        stages: curriculum, pairs (first step, slots of the longest clip); each stage begins its own epochs. Longer clips
            than the last stage's are refused, as are clips that fit no row if there are no stages.
    Raises:
        UserError: clips that fit no row, or stages without a clip.
    """

    def __init__(
        self,
        seed: int,
        sizes_N3: np.ndarray,
        *,
        num_rows: int,
        num_slots: int,
        num_patches: int,
        target_patches: int | None = None,
        stages: Sequence[tuple[int, int]] = (),
    ):
        self.num_rows, self.num_slots, self.num_patches = num_rows, num_slots, num_patches
        budgets = np.array([num_slots, num_patches, target_patches or num_patches])
        too_big = np.flatnonzero((sizes_N3 > budgets).any(axis=1))
        if len(too_big):
            slots, patches, targets = sizes_N3[too_big].max(axis=0)
            raise UserError(
                f"{len(too_big)} of {len(sizes_N3)} clips fit no row of {num_slots} slots, {num_patches} patches and "
                f"{budgets[2]} target patches; the largest take {slots}, {patches} and {targets}: raise the budgets or "
                "prepare with a smaller max_sec"
            )
        stages = sorted(stages) or [(0, num_slots)]
        left_out = int((sizes_N3[:, 0] > stages[-1][1]).sum())
        if stages[0][0] != 0 or left_out:
            raise UserError(
                f"stages {stages}: expected one from step 0, and a last one for all clips (it leaves out {left_out})"
            )
        self._stages = [
            (first_step, _Stream(seed, np.flatnonzero(sizes_N3[:, 0] <= longest), sizes_N3, budgets))
            for first_step, longest in stages
        ]

    def rows(self, step: int) -> list[list[int]]:
        """The clips of each of the B rows of a step."""
        first_step, stream = [stage for stage in self._stages if stage[0] <= step][-1]
        first_row = (step - first_step) * self.num_rows
        return [stream.row(i) for i in range(first_row, first_row + self.num_rows)]


class _Stream:
    """An endless sequence of packed rows over some clips, by random access; safe to share between threads."""

    def __init__(self, seed, clips, sizes_N3, budgets):
        if not len(clips):
            raise UserError("a pack plan needs at least one clip; this corpus, or one of the stages, has none")
        self._seed, self._clips = seed, clips
        self._fractions = sizes_N3 / budgets
        self._windows_per_epoch = math.ceil(len(clips) / WINDOW_CLIPS)
        self._starts = [0]  # first row of each window packed so far, and of the next one
        self._kept: dict[int, list[list[int]]] = {}
        self._lock = threading.Lock()

    def row(self, index: int) -> list[int]:
        with self._lock:
            while index >= self._starts[-1]:
                self._starts.append(self._starts[-1] + len(self._window(len(self._starts) - 1)))
            window = int(np.searchsorted(self._starts, index, side="right")) - 1
            return self._window(window)[index - self._starts[window]]

    def _window(self, window: int) -> list[list[int]]:
        if window not in self._kept:
            epoch, part = divmod(window, self._windows_per_epoch)
            order = np.random.default_rng((self._seed, epoch)).permutation(self._clips)
            clips = np.array_split(order, self._windows_per_epoch)[part]
            rows = _best_fit(self._fractions[clips])
            shuffle = np.random.default_rng((self._seed, epoch, part)).permutation(len(rows))
            while len(self._kept) >= _KEPT_WINDOWS:
                del self._kept[next(iter(self._kept))]
            self._kept[window] = [[int(clips[i]) for i in rows[r]] for r in shuffle]
        return self._kept[window]


def _best_fit(fractions_NK: np.ndarray) -> list[list[int]]:
    """Items into rows, in their order; an item takes `fractions` of each budget of a row."""
    slack = 1e-9  # of summed fractions
    rows: list[list[int]] = []
    room_RK = np.zeros((0, fractions_NK.shape[1]))  # of the open rows
    open_rows = np.zeros(0, np.int64)
    smallest_K = fractions_NK.min(axis=0)
    for item, fraction_K in enumerate(fractions_NK):
        tightest_R = (room_RK - fraction_K).min(axis=1)
        fits_R = tightest_R >= -slack
        if fits_R.any():
            r = int(np.where(fits_R, tightest_R, np.inf).argmin())
        else:
            full_R = (room_RK < smallest_K - slack).any(axis=1)
            keep = np.flatnonzero(~full_R)[-_OPEN_ROWS + 1 :]
            room_RK = np.concatenate([room_RK[keep], np.ones((1, room_RK.shape[1]))])
            open_rows = np.append(open_rows[keep], len(rows))
            rows.append([])
            r = len(open_rows) - 1
        room_RK[r] -= fraction_K
        rows[open_rows[r]].append(item)
    return rows


# ---- batch -----------------------------------------------------------------------------------------------------------


def assemble(source: Source, rows: Sequence[Sequence[int]], *, num_slots: int, num_patches: int) -> Batch:
    """The batch whose row i holds the clips rows[i]."""
    laid_out = [[lay_out_clip(source[i]) for i in row] for row in rows]
    return pack(laid_out, num_slots=num_slots, num_patches=num_patches, patch_shape=source.patch_shape)


def lay_out_clip(clip: Clip):
    """A clip's sequence: prompt clip, reference cloning or zero-shot."""
    if clip.is_prompt:
        return lay_out_prompt_clip(clip.text_ids, clip.patches_MPC)
    return lay_out(clip.text_ids, reference_MPC=clip.reference_MPC, target_MPC=clip.patches_MPC)


# ---- synthetic corpus ------------------------------------------------------------------------------------------------


class Synthetic:
    """A seeded corpus in memory that a model can learn: each token sounds for `patches_per_token` patches.

    A token has its own mean patch; a clip's patches are those means of its tokens in turn, plus noise, at unit variance.
    So what is said, how it goes on and when it ends all follow from the text. Ids of special tokens do not occur.

    Args:
        num_clips: clips of an epoch.   vocab_size: ids 105 .. vocab_size - 1 occur.   patch_shape: (P, C).
        median_patches, sigma, max_patches: of the log-normal distribution of a clip's patches.
        noise: standard deviation that does not follow from the tokens.
    """

    def __init__(
        self,
        seed: int,
        *,
        num_clips: int = 512,
        vocab_size: int = 512,
        patch_shape: tuple[int, int] = (4, 64),
        patch_sec: float = 0.16,
        median_patches: float = 12.0,
        sigma: float = 0.5,
        max_patches: int = 375,
        patches_per_token: int = 2,
        noise: float = 0.3,
    ):
        first_id = 105
        assert vocab_size > first_id and max_patches >= patches_per_token
        rng = np.random.default_rng((seed, 0))
        patches = median_patches * np.exp(sigma * rng.standard_normal(num_clips))
        tokens = np.clip(np.rint(patches / patches_per_token), 1, max_patches // patches_per_token).astype(np.int32)
        self.lengths = np.zeros((num_clips, 4), np.int32)
        self.lengths[:, TEXT], self.lengths[:, PATCHES] = tokens, tokens * patches_per_token
        self.patch_shape, self.patch_sec, self.vocab_size = patch_shape, patch_sec, vocab_size
        self._seed, self._repeats, self._noise, self._first_id = seed, patches_per_token, noise, first_id
        self._mean_VPC = rng.standard_normal((vocab_size, *patch_shape), np.float32) * np.float32(math.sqrt(1 - noise**2))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Clip:
        rng = np.random.default_rng((self._seed, 1, int(index)))
        text_ids = rng.integers(self._first_id, self.vocab_size, self.lengths[index, TEXT], dtype=np.int32)
        mean_MPC = np.repeat(self._mean_VPC[text_ids], self._repeats, axis=0)
        noise_MPC = rng.standard_normal(mean_MPC.shape, np.float32)
        return Clip(text_ids, mean_MPC + np.float32(self._noise) * noise_MPC, dataset="synthetic")


def synthetic_corpus(seed: int, **options) -> Synthetic:
    """A seeded in-memory corpus with the face of shards; options as in `Synthetic`."""
    return Synthetic(seed, **options)
