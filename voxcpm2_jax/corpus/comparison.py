"""What shows when all clips of a corpus are compared: duplicates, outliers, overlap with validation, hours, packed rows.

Of each clip a row of 69 bytes is kept, names and sounds as 64-bit hashes. Names that a report shows are read again.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from voxcpm2_jax.config.run import BatchConfig
from voxcpm2_jax.corpus.faults import Findings, Limits
from voxcpm2_jax.corpus.manifest import Recording
from voxcpm2_jax.data import packing
from voxcpm2_jax.data.clips import LENGTHS

ROW = np.dtype(
    [
        ("number", "i8"),  # of the recording: those to train on, then those of validation
        ("sec", "f8"),
        ("rate", "i4"),  # Hz
        ("tokens", "i4"),
        ("characters", "i4"),
        ("sound", "u8"),  # the samples
        ("words", "u8"),  # speaker, description and text
        ("voice", "u8"),  # dataset, speaker and session: prepare chooses reference clips among those with the same three
        ("speaker", "u8"),  # 0: not named
        ("language", "i4"),  # number in Clips.languages
        ("dataset", "i4"),
        ("needs_partner", "?"),  # has a speaker, but no reference clip of its own
    ]
)
_BLOCK = 1 << 20


class Clips(NamedTuple):
    """All recordings that can be opened."""

    training: np.ndarray  # ROW [clips], in the order of the recordings
    validation: np.ndarray
    languages: Sequence[str]
    datasets: Sequence[str]
    recordings: Sequence[Recording]  # by their numbers

    def name(self, number: int) -> str:
        return str(self.recordings[number].audio)


def compare(findings: Findings, clips: Clips, limits: Limits) -> None:
    """Adds the faults that only show when recordings are compared with each other."""
    rows, number = clips.training, clips.training["number"]
    for kind, field in (("duplicate text", "words"), ("duplicate audio", "sound")):
        for i, first in zip(*_repeats(rows[field])):
            findings.add(kind, clips.name(number[i]), f"as {clips.name(number[first])}")
    order = np.argsort(rows["voice"], kind="stable")
    starts, sizes = _groups(rows["voice"][order])
    alone = order[starts[sizes == 1]]
    for i in np.sort(alone[rows["needs_partner"][alone]]):
        findings.add("no partner", clips.name(number[i]), f"speaker {clips.recordings[number[i]].speaker}")
    for dataset, name in enumerate(clips.datasets):
        rates, counts = np.unique(rows["rate"][rows["dataset"] == dataset], return_counts=True)
        if len(rates) > 1:
            most_first = np.argsort(-counts, kind="stable")
            findings.add("mixed rates", name, ", ".join(f"{counts[i]} at {rates[i]} Hz" for i in most_first))
    for i, note in _outliers(rows, len(clips.languages), limits):
        findings.add("text or duration outlier", clips.name(number[i]), note)
    held, held_number = clips.validation, clips.validation["number"]
    for i, first in zip(*_matches(held["sound"], rows["sound"])):
        findings.add("audio in validation", clips.name(held_number[i]), f"as {clips.name(number[first])}")
    for i, _ in zip(*_matches(held["speaker"], rows["speaker"])):
        if held["speaker"][i]:
            name, speaker = clips.name(held_number[i]), clips.recordings[held_number[i]].speaker
            findings.add("speaker in validation", name, f"speaker {speaker}")


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of equal values starts, and how long it is."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
    return starts, np.diff(starts, append=len(values))


def _repeats(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of values that stood before, in order; and where each stood first."""
    order = np.argsort(values, kind="stable")
    starts, sizes = _groups(values[order])
    first = np.repeat(order[starts], sizes)
    again, first = order[order != first], first[order != first]
    in_order = np.argsort(again)
    return again[in_order], first[in_order]


def _matches(values: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of values that are among others, in order; and where each first is."""
    order = np.argsort(among, kind="stable")
    at = np.searchsorted(among, values, sorter=order)
    (inside,) = np.nonzero(at < len(among))
    first = order[at[inside]]
    is_same = among[first] == values[inside]
    return inside[is_same], first[is_same]


def speed(rows: np.ndarray) -> np.ndarray:
    """Characters per second."""
    return rows["characters"] / np.maximum(rows["sec"], 1e-3)


def _outliers(rows: np.ndarray, num_languages: int, limits: Limits) -> Iterator[tuple[int, str]]:
    """The clips with far more or less text per second than is usual in their language."""
    for language in range(num_languages):
        members = np.flatnonzero(rows["language"] == language)
        if len(members) < 8:
            continue
        speeds = speed(rows[members])
        logs = np.log(np.maximum(speeds, 1e-3))
        middle = np.median(logs)
        spread = max(1.4826 * np.median(np.abs(logs - middle)), 0.1)
        for i in np.flatnonzero(np.abs(logs - middle) > limits.outlier * spread):
            note = f"{speeds[i]:.1f} characters per second; usual are {math.exp(middle):.1f}"
            yield int(members[i]), note


# ---- figures ---------------------------------------------------------------------------------------------------------


def describe(clips: Clips) -> dict:
    """Hours and distributions of the training clips."""
    rows = clips.training
    order = np.argsort(rows["speaker"], kind="stable")
    starts, _ = _groups(rows["speaker"][order])
    sec = np.add.reduceat(rows["sec"][order], starts) if len(rows) else np.zeros(0)
    most = np.argsort(-sec, kind="stable")[:20]
    speakers = [clips.recordings[rows["number"][order[starts[i]]]].speaker or "unknown" for i in most]
    rates, counts = np.unique(rows["rate"], return_counts=True)
    return {
        "clips": len(rows),
        "recordings": len(clips.recordings),
        "hours": round(float(rows["sec"].sum()) / 3600, 4),
        "by_language": _hours(rows, "language", clips.languages),
        "by_dataset": _hours(rows, "dataset", clips.datasets),
        "by_speaker": {name: round(sec[i] / 3600, 4) for name, i in zip(speakers, most)},
        "speakers": int((rows["speaker"][order[starts]] > 0).sum()),
        "rates": dict(zip(map(str, rates), counts.tolist())),
        "duration_sec": _quantiles(rows["sec"]),
        "characters_per_sec": _quantiles(speed(rows)),
    }


def _hours(rows: np.ndarray, field: str, names: Sequence[str]) -> dict[str, float]:
    hours = np.bincount(rows[field], rows["sec"], minlength=len(names)) / 3600
    return {names[i]: round(float(hours[i]), 4) for i in np.argsort(-hours, kind="stable") if hours[i]}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    names = {"min": 0, "1 %": 1, "median": 50, "99 %": 99, "max": 100}
    return dict(zip(names, (round(float(x), 3) for x in np.percentile(values, list(names.values())))))


def forecast(rows: np.ndarray, batch: BatchConfig, patch_sec: float, is_estimate: bool) -> dict:
    """Rows of an epoch and how full they are, for the clips that fit a row."""
    budgets = np.array(packing.budgets_of(batch))
    blocks = [_sizes(rows[start : start + _BLOCK], patch_sec) for start in range(0, len(rows), _BLOCK)]
    sizes = np.concatenate([np.zeros((0, len(budgets)), np.int32), *blocks])
    fits = (sizes <= budgets).all(axis=1)
    figures = {
        "rows": batch.rows, "slots": batch.slots, "patches": batch.patches, "tokens_guessed": is_estimate,
        "clips_that_fit_no_row": int((~fits).sum()),
    }  # fmt: skip
    if not fits.any():
        return figures
    sizes = sizes[fits]
    _, num_rows = packing.share_rows(sizes[: packing.WINDOW_CLIPS] / budgets)
    num_rows = num_rows * len(sizes) / min(len(sizes), packing.WINDOW_CLIPS)
    used = sizes.sum(axis=0) / num_rows / budgets
    return figures | {
        "rows_per_epoch": round(num_rows),
        "steps_per_epoch": round(num_rows / batch.rows, 1),
        "slots_used": round(float(used[packing.SLOTS]), 4),
        "patches_used": round(float(used[packing.PATCHES]), 4),
        "recommended_patches": packing.recommend_patches(sizes, batch.slots),
    }


def _sizes(rows: np.ndarray, patch_sec: float) -> np.ndarray:
    lengths = np.zeros(len(rows), LENGTHS)
    lengths["text"] = rows["tokens"]
    lengths["patches"] = np.ceil(rows["sec"] / patch_sec - 1e-6)
    return packing.sizes(lengths).astype(np.int32)
