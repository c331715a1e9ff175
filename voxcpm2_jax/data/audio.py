"""Recordings in and out: load, resample, pad, save.

    file -> its samples up to their real end (recording.py) -> checked and mixed (sound.py) -> soxr "HQ" to the wanted rate
         -> float32 [A]

Of a recording without a fault, `load` returns what the PyTorch package's loader returns, `librosa.load(path, sr=rate,
mono=True)` (tested), but calls soundfile and soxr directly, because librosa takes seconds to import.
"""

import math
import os
from typing import NamedTuple

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.sound import AS_RECORDED, KEEP, SoundConfig
from voxcpm2_jax.data import sound
from voxcpm2_jax.data.recording import BadRecording, Opened, Stored, opened, unless_the_machine_fails

SILENT = 1e-4  # peak below which a recording counts as silent (-80 dB)
_CUT_SEC = 0.1  # a file that ends this much before its stated length is cut off; codecs state theirs less exactly


class Sound(NamedTuple):
    """A recording, or a part of it, as it is stored.

    Attributes:
        channels_AE: float32, finite, at `rate`.   is_cut: the file ends before its end.
        note: what the header says against what is there; empty: it is right.
    """

    channels_AE: np.ndarray
    rate: int
    is_cut: bool
    note: str

    @property
    def sec(self) -> float:
        return len(self.channels_AE) / self.rate


def load(
    recording: str | os.PathLike | Stored,
    sample_rate: int,
    start_sec: float | None = None,
    end_sec: float | None = None,
    *,
    min_samples: int = 1,
    max_sec: float = math.inf,
    rules: SoundConfig = AS_RECORDED,
) -> np.ndarray:
    """A recording, or a part of it, as float32 [A] mono at `sample_rate`. Only the part is decoded.

    Args:
        recording: wav, flac, mp3, ogg, opus and others, any rate and channel count; m4a, webm and others with PyAV.
        start_sec, end_sec: the part; None: the beginning, the end.
        min_samples: the shortest accepted result, at `sample_rate`.   max_sec: the longest; more is not decoded.
        rules: what to do about faults of the sound.
    Raises:
        BadRecording: missing, unreadable, empty, not finite, silent or too short; or with a fault for which to skip it.
        ReadError: the machine fails to read the file.
    """
    found = read(recording, start_sec, end_sec, max_sec=max_sec)
    audio_A = _resampled_as_librosa_does(mono(recording, found, rules), found.rate, sample_rate)
    if len(audio_A) < min_samples:
        got, wanted = len(audio_A) / sample_rate, min_samples / sample_rate
        raise BadRecording("too short", f"{recording}: {got:.3f} s is too short; expected at least {wanted:.3f} s")
    return audio_A


def mono(recording: str | os.PathLike | Stored, found: Sound, rules: SoundConfig) -> np.ndarray:
    """The audio [A] of what was read of a recording, at its own rate; raises BadRecording as `load`."""
    if found.is_cut and rules.cut != KEEP:
        raise BadRecording("cut off", f"{recording}: cut off: {found.note}; copy it again")
    if not len(found.channels_AE):
        raise BadRecording("empty", f"{recording}: empty recording")
    audio_A, fault, note = sound.mend(found.channels_AE, found.rate, rules)
    if fault:
        raise BadRecording(fault, f"{recording}: {fault}: {note}")
    if (peak := np.abs(audio_A - audio_A.mean()).max()) < SILENT:
        raise BadRecording("silent", f"{recording}: silent (peak {peak:.1e})")
    return audio_A


def read(
    recording: str | os.PathLike | Stored,
    start_sec: float | None = None,
    end_sec: float | None = None,
    *,
    max_sec: float = math.inf,
) -> Sound:
    """A recording, or a part of it, at its own rate and with all its channels; arguments and errors as in `load`."""
    return unless_the_machine_fails(recording, lambda: _read(recording, start_sec or 0.0, end_sec, max_sec))


def _read(recording: str | os.PathLike | Stored, start_sec: float, end_sec: float | None, max_sec: float) -> Sound:
    if start_sec < 0 or (end_sec is not None and end_sec <= start_sec):
        raise BadRecording("bad part", f"{recording}: cannot take seconds {start_sec} to {end_sec}; expected 0 <= start < end")
    with opened(recording) as file:
        source, rate = file.source, file.source.samplerate
        start, have = int(start_sec * rate), source.frames
        if have is not None and start >= have > 0:
            raise BadRecording("bad part", f"{recording}: starts at {start_sec} s, but the recording has {have / rate:.2f} s")
        count = math.inf if end_sec is None else int((end_sec - start_sec) * rate)
        sec = min(count, math.inf if have is None else have - start) / rate
        if have is None and count > max_sec * rate:
            count = int(max_sec * rate) + 1
        elif sec > max_sec:  # checked before it takes memory
            raise too_long(recording, sec, max_sec)
        channels_AE = _samples(recording, file, start, count)
    sec = len(channels_AE) / rate
    if sec > max_sec:
        raise too_long(recording, sec, max_sec)
    is_cut, note = _compared(file, sec, start_sec, end_sec)
    if end_sec is not None and not is_cut and sec < end_sec - start_sec - _CUT_SEC:
        raise BadRecording("bad part", f"{recording}: ends at {start_sec + sec:.2f} s, but the part at {end_sec:.2f} s")
    if not np.isfinite(channels_AE).all():
        wrong = np.flatnonzero(~np.isfinite(channels_AE).all(axis=1))
        first = start_sec + wrong[0] / rate
        raise BadRecording(
            "not finite", f"{recording}: {len(wrong)} samples that are not finite numbers, the first at {first:.3f} s"
        )
    return Sound(channels_AE, rate, is_cut, note)


def _compared(file: Opened, sec: float, start_sec: float, end_sec: float | None) -> tuple[bool, str]:
    """Whether the file ends before its end, and what it says about its length if that is wrong; `sec` were read."""
    end = math.inf if end_sec is None else end_sec
    said_sec, frames = file.said_sec, file.source.frames
    if said_sec is None and file.length.is_cut and sec < end - start_sec - _CUT_SEC:
        return True, f"{sec:.2f} s are there, the end is missing"
    if said_sec is None and file.length.there is not None:  # a header that should state a length
        return False, f"the header states no length, {sec:.2f} s are there"
    expected = frames / file.source.samplerate if said_sec is None and frames else said_sec
    if expected is None:
        return False, ""
    expected = max(0.0, min(expected, end) - start_sec)
    is_wrong = abs(sec - expected) > _CUT_SEC
    return sec < expected - _CUT_SEC, f"the header states {expected:.2f} s, {sec:.2f} s are there" if is_wrong else ""


def _samples(recording: str | os.PathLike | Stored, file: Opened, start: int, count: float) -> np.ndarray:
    """At most `count` frames from `start` on, [A, channels]."""
    from voxcpm2_jax.data.decoders import BLOCK, DecodeError

    source, blocks, at = file.source, [], 0
    wanted = block = 4096 if file.length.is_cut else BLOCK  # decoders fail in the block that is incomplete
    try:
        if start:
            source.seek(start)
        while at < count:
            wanted = int(min(block, count - at))
            blocks.append(source.read(wanted))
            at += len(blocks[-1])
            if len(blocks[-1]) < wanted:
                break
    except DecodeError as error:
        if not file.length.is_cut:
            begin, end = ((start + n) / source.samplerate for n in (at, at + wanted))
            raise BadRecording("unreadable", f"{recording}: damaged between {begin:.1f} and {end:.1f} s ({error})") from None
    return np.concatenate(blocks) if blocks else np.zeros((0, source.channels), np.float32)


def too_long(recording: str | os.PathLike | Stored, sec: float, max_sec: float) -> BadRecording:
    return BadRecording("too long", f"{recording}: {sec:.1f} s is too long; expected at most {max_sec:.1f} s")


def _resampled_as_librosa_does(audio_A: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    import soxr

    if rate == sample_rate:
        return audio_A
    samples = math.ceil(len(audio_A) * (sample_rate / rate))  # in this order: librosa's rounding
    audio_A = soxr.resample(audio_A, rate, sample_rate, quality="HQ")[:samples]
    return np.pad(audio_A, (0, samples - len(audio_A)))


def pad_to_patches(audio_A: np.ndarray, patch_samples: int, side: str) -> np.ndarray:
    """Adds zeros up to a whole number of patches.

    Args:
        side: "right" for reference clips and training clips, "left" for a prompt that speech continues from.
    """
    assert side in ("left", "right"), side
    missing = -len(audio_A) % patch_samples
    return np.pad(audio_A, (missing, 0) if side == "left" else (0, missing))


def resample(audio_A: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """The audio at another rate: ceil(A x new / old) samples or one fewer."""
    import soxr

    return audio_A if rate == new_rate else soxr.resample(audio_A.astype(np.float32, copy=False), rate, new_rate, quality="HQ")


class Properties(NamedTuple):
    """What a recording's header shows."""

    rate: int
    channels: int
    sec: float | None  # None: not known before it is decoded
    said_sec: float | None  # as the header states it


def properties(recording: str | os.PathLike | Stored) -> Properties:
    """Reads the header of a recording, and where that may lie its end.

    Raises:
        BadRecording: missing or unreadable.   ReadError: the machine fails to read the file.
    """

    def look() -> Properties:
        with opened(recording) as file:
            source = file.source
            sec = None if source.frames is None else source.frames / source.samplerate
            return Properties(source.samplerate, source.channels, sec, file.said_sec)

    return unless_the_machine_fails(recording, look)


def save(path: str | os.PathLike, audio_A: np.ndarray, rate: int) -> None:
    """Writes a recording in the format of the file's suffix, 16 bits per sample where the format allows; never half a file.

    Raises:
        UserError: the directory or the format cannot be written.
    """
    import soundfile

    try:
        with files.aside(path) as temporary:
            soundfile.write(temporary, audio_A, rate)
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
