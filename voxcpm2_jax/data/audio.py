"""Recordings in and out: load, resample, pad, save.

    file -> its samples up to their real end (recording.py) -> checked and mixed (sound.py) -> soxr "HQ" to the wanted rate
         -> float32 [A]

Of a recording without a fault, `load` returns what the PyTorch package's loader returns, `librosa.load(path, sr=rate,
mono=True)` (tested), but calls soundfile and soxr directly, because librosa takes seconds to import.
"""

import math
import os
from collections.abc import Iterator
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
    with opened(recording) as file:
        blocks = list(_blocks(recording, file, start_sec, end_sec, max_sec))
        channels_AE = np.concatenate(blocks) if blocks else np.zeros((0, file.source.channels), np.float32)
    rate = file.source.samplerate
    return Sound(channels_AE, rate, *_compared(recording, file, len(channels_AE) / rate, start_sec, end_sec))


def check(recording: str | os.PathLike | Stored, start_sec: float | None = None, end_sec: float | None = None) -> float:
    """Decodes a recording, or a part of it, to its end -> its seconds. Memory does not grow with them.

    Raises:
        BadRecording: missing, unreadable, damaged, cut off, empty, not finite, out of scale or silent.
        ReadError: the machine fails to read the file.
    """
    return unless_the_machine_fails(recording, lambda: _check(recording, start_sec or 0.0, end_sec))


def _check(recording: str | os.PathLike | Stored, start_sec: float, end_sec: float | None) -> float:
    samples, lowest, highest = 0, math.inf, -math.inf  # the last two of each channel
    with opened(recording) as file:
        for block_AE in _blocks(recording, file, start_sec, end_sec, math.inf):
            if len(block_AE):
                samples += len(block_AE)
                lowest, highest = np.minimum(lowest, block_AE.min(axis=0)), np.maximum(highest, block_AE.max(axis=0))
    sec = samples / file.source.samplerate
    is_cut, note = _compared(recording, file, sec, start_sec, end_sec)
    if is_cut:
        raise BadRecording("cut off", f"{recording}: cut off: {note}; copy it again")
    if not samples:
        raise BadRecording("empty", f"{recording}: empty recording")
    if (peak := max(np.max(highest), -np.min(lowest))) > sound.FULL_SCALE:
        raise BadRecording("wrong scale", f"{recording}: wrong scale: samples up to {peak:,.5g}, full scale is 1")
    if (peak := np.max(highest - lowest) / 2) < SILENT:
        raise BadRecording("silent", f"{recording}: silent (peak {peak:.1e})")
    return sec


def _blocks(
    recording: str | os.PathLike | Stored, file: Opened, start_sec: float, end_sec: float | None, max_sec: float
) -> Iterator[np.ndarray]:
    """The samples of a part [A, channels], some at a time; see `load` for arguments and errors."""
    from voxcpm2_jax.data.decoders import BLOCK, DecodeError

    if start_sec < 0 or (end_sec is not None and end_sec <= start_sec):
        raise BadRecording("bad part", f"{recording}: cannot take seconds {start_sec} to {end_sec}; expected 0 <= start < end")
    source, rate, have = file.source, file.source.samplerate, file.source.frames
    start = int(start_sec * rate)
    if have is not None and start >= have > 0:
        raise BadRecording("bad part", f"{recording}: starts at {start_sec} s, but the recording has {have / rate:.2f} s")
    count = math.inf if end_sec is None else int((end_sec - start_sec) * rate)
    if have is not None and (sec := min(count, have - start) / rate) > max_sec:  # before it takes memory
        raise _too_long(recording, sec, max_sec)
    at = 0
    wanted = block = 4096 if file.length.is_cut else BLOCK  # decoders fail in the block that is incomplete
    try:
        if start:
            source.seek(start)
        while at < count:
            wanted = int(min(block, count - at))
            samples_AE = source.read(wanted)
            if not np.isfinite(samples_AE).all():
                first = (start + at + np.flatnonzero(~np.isfinite(samples_AE).all(axis=1))[0]) / rate
                raise BadRecording(
                    "not finite", f"{recording}: samples that are not finite numbers, the first at {first:.3f} s"
                )
            at += len(samples_AE)
            if at > max_sec * rate:  # of a recording that does not state its length
                raise _too_long(recording, at / rate, max_sec)
            yield samples_AE
            if len(samples_AE) < wanted:
                break
    except DecodeError as error:
        if not file.length.is_cut:
            begin, end = ((start + n) / rate for n in (at, at + wanted))
            raise BadRecording("unreadable", f"{recording}: damaged between {begin:.1f} and {end:.1f} s ({error})") from None


def _too_long(recording: str | os.PathLike | Stored, sec: float, max_sec: float) -> BadRecording:
    return BadRecording("too long", f"{recording}: {sec:.1f} s is too long; expected at most {max_sec:.1f} s")


def _compared(
    recording: str | os.PathLike | Stored, file: Opened, sec: float, start_sec: float, end_sec: float | None
) -> tuple[bool, str]:
    """Whether the file ends before its end, and what it says about its length if that is wrong; `sec` were read.

    Raises:
        BadRecording: the part goes on after the end of the recording.
    """
    said_sec, frames = file.said_sec, file.source.frames
    is_short = end_sec is not None and sec < end_sec - start_sec - _CUT_SEC
    if said_sec is None and file.length.is_cut and (is_short or end_sec is None):
        return True, f"{sec:.2f} s are there, the end is missing"
    expected = frames / file.source.samplerate if said_sec is None and frames else said_sec
    if expected is not None:
        expected = max(0.0, min(expected, math.inf if end_sec is None else end_sec) - start_sec)
        if sec < expected - _CUT_SEC:
            return True, f"the header states {expected:.2f} s, {sec:.2f} s are there"
    if is_short:
        raise BadRecording("bad part", f"{recording}: ends at {start_sec + sec:.2f} s, but the part at {end_sec:.2f} s")
    if said_sec is None and file.length.there is not None:  # a header that should state a length
        return False, f"the header states no length, {sec:.2f} s are there"
    is_wrong = expected is not None and sec > expected + _CUT_SEC
    return False, f"the header states {expected:.2f} s, {sec:.2f} s are there" if is_wrong else ""


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
