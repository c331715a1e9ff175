"""Clips: what is stored of one, what the index holds of all, and how one is laid out in a row.

    Clip     text ids and latents of one recording; read when a batch is assembled
    Index    lengths, groups and pairs of all clips; enough to plan every row without reading a clip
    Draw     one clip in one row, in a mode: with or without a reference clip, with or without its description
    mode     how a clip is laid out (MODES); unrelated to the mean mode of LocDiT
    label    number of a draw's (dataset, language, mode); losses are reported by it

Needs only numpy.
"""

from typing import NamedTuple, Protocol

import numpy as np

from voxcpm2_jax.sequence import Sequence, lay_out, lay_out_prompt_clip

LENGTHS = np.dtype(
    [
        ("text", "i4"),  # tokens of the text
        ("patches", "i4"),  # audio patches
        ("reference", "i4"),  # patches of the reference clip that the corpus names; 0: none
        ("is_prompt", "i4"),  # 1: a prompt clip, whose patches bear no loss
        ("described", "i4"),  # tokens of "(description)text"; 0: no description
        ("group", "i4"),  # number in Index.groups
    ]
)


class Clip(NamedTuple):
    """One clip as it is stored."""

    text_ids: np.ndarray  # int32 [tokens]
    patches_MPC: np.ndarray  # float32 latents of the clip
    reference_MPC: np.ndarray | None = None  # latents of the reference clip, if the corpus names one
    described_ids: np.ndarray | None = None  # int32: "(description)text"
    is_prompt: bool = False  # bears no loss
    text: str = ""
    description: str | None = None
    dataset: str | None = None
    language: str | None = None
    speaker: str | None = None
    session: str | None = None


class Index(NamedTuple):
    """What is known of every clip without reading it."""

    lengths: np.ndarray  # LENGTHS [clips]
    groups: tuple[tuple[str, str], ...]  # dataset and language
    pairs: np.ndarray | None = None  # int32 [clips, k]: other clips that may be a clip's reference clip; -1 behind the last


class Source(Protocol):
    """A corpus of clips with random access: shards.Shards, synthetic.Synthetic."""

    index: Index
    patch_shape: tuple[int, int]  # (P, C)
    patch_sec: float

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...


def as_lengths(array: np.ndarray) -> np.ndarray:
    """LENGTHS [clips] of a stored array. Older shards have the same fields as the columns of an int32 [clips, 6]."""
    return np.ascontiguousarray(array, np.int32).view(LENGTHS)[:, 0] if array.ndim == 2 else array


# ---- layout ----------------------------------------------------------------------------------------------------------

NO_REFERENCE, OWN_REFERENCE = -1, -2

MODES = ("zero-shot", "described", "reference", "described reference", "prompt")
"""How a clip is laid out; the number of the first four is is_described + 2 * has_reference."""


class Draw(NamedTuple):
    """One clip of a row and how it is laid out."""

    clip: int
    reference: int = NO_REFERENCE  # number of the reference clip, or OWN_REFERENCE: the one that the corpus names
    is_described: bool = False


def lay_out_draw(source: Source, draw: Draw) -> Sequence:
    """The sequence of a draw; see sequence.py for the layouts."""
    clip = source[draw.clip]
    ids = clip.described_ids if draw.is_described else clip.text_ids
    if clip.is_prompt:
        return lay_out_prompt_clip(ids, clip.patches_MPC)
    reference_MPC = None
    if draw.reference != NO_REFERENCE:
        is_own = draw.reference == OWN_REFERENCE
        reference_MPC = clip.reference_MPC if is_own else source[draw.reference].patches_MPC
    return lay_out(ids, reference_MPC=reference_MPC, target_MPC=clip.patches_MPC)


# ---- labels ----------------------------------------------------------------------------------------------------------


def label(index: Index, draw: Draw) -> int:
    """The number of a draw's dataset, language and mode: group x modes + mode."""
    lengths = index.lengths[draw.clip]
    if lengths["is_prompt"]:
        mode = MODES.index("prompt")
    else:
        mode = draw.is_described + 2 * (draw.reference != NO_REFERENCE)
    return int(lengths["group"]) * len(MODES) + mode


def label_names(index: Index) -> list[tuple[str, str, str]]:
    """(dataset, language, mode) of every label."""
    return [(*group, mode) for group in index.groups for mode in MODES]


def label_patches(index: Index) -> np.ndarray:
    """For every label, the most patches that an epoch can hold of it with loss."""
    lengths = index.lengths
    is_target, is_described = lengths["is_prompt"] == 0, lengths["described"] > 0
    has_reference = lengths["reference"] > 0
    if index.pairs is not None:
        has_reference |= (index.pairs >= 0).any(axis=1)
    possible = (True, is_described, has_reference, is_described & has_reference, False)  # in the order of MODES
    patches = [
        np.bincount(lengths["group"], lengths["patches"] * (is_target & is_possible), minlength=len(index.groups))
        for is_possible in possible
    ]
    return np.stack(patches, axis=1).ravel()
