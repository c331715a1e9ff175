"""Recordings in and out: load, resample, pad, save.

    file -> mean of its channels -> soxr "HQ" to the wanted rate -> checked -> float32 [A]

`load` returns what the PyTorch package's loader returns, `librosa.load(path, sr=rate, mono=True)` (tested), but calls soundfile
and soxr directly, because librosa takes seconds to import.
"""

import contextlib
import io
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data.records import ReadError, patiently

T = TypeVar("T")


class BadRecording(UserError):  # noqa: N818
    """A recording that cannot be used; `reason` is one of a few fixed words, under which such recordings are counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


SILENT = 1e-4  # peak below which a recording counts as silent (-80 dB)


@dataclass(frozen=True)
class Stored:
    """A recording inside a data set, not in a file of its own. It is used in place of a path and read when it is loaded.

    Attributes:
        name: unique; shown in reports.
        read: returns samples, [A] or [A, channels], and their rate; or the content of an audio file and None.
        place: where it lies, whatever split of the set it is read in; empty: the name tells.
    """

    name: str
    read: Callable[[], tuple[np.ndarray | bytes, int | None]] = field(compare=False, repr=False)
    place: str = ""

    def __str__(self) -> str:
        return self.name


def load(
    recording: str | os.PathLike | Stored,
    sample_rate: int,
    start_sec: float | None = None,
    end_sec: float | None = None,
    *,
    min_samples: int = 1,
    max_sec: float = math.inf,
) -> np.ndarray:
    """A recording, or a part of it, as float32 [A] mono at `sample_rate`. Only the part is decoded.

    Args:
        recording: wav, flac, mp3, ogg or opus, any rate and channel count.
        start_sec, end_sec: the part; None: the beginning, the end.
        min_samples: the shortest accepted result, at `sample_rate`.   max_sec: the longest; more is not decoded.
    Raises:
        BadRecording: missing, unreadable, empty, not finite, silent or too short.
        ReadError: the machine fails to read the file.
    """
    return _unless_the_machine_fails(recording, lambda: _load(recording, sample_rate, start_sec, end_sec, min_samples, max_sec))


def _load(recording, sample_rate: int, start_sec, end_sec, min_samples: int, max_sec: float) -> np.ndarray:
    import soxr

    start_sec = start_sec or 0.0
    if start_sec < 0 or (end_sec is not None and end_sec <= start_sec):
        raise BadRecording("bad part", f"{recording}: cannot take seconds {start_sec} to {end_sec}; expected 0 <= start < end")
    with _opened(recording) as file:
        rate = file.samplerate
        start = int(start_sec * rate)
        if start >= file.frames > 0:
            have = file.frames / rate
            raise BadRecording("bad part", f"{recording}: starts at {start_sec} s, but the recording has {have:.2f} s")
        file.seek(start)
        count = -1 if end_sec is None else int((end_sec - start_sec) * rate)
        sec = (file.frames - start if count < 0 else min(count, file.frames - start)) / rate
        if sec > max_sec:  # checked before it takes memory
            raise BadRecording("too long", f"{recording}: {sec:.1f} s is too long; expected at most {max_sec:.1f} s")
        channels = file.read(count, dtype="float32", always_2d=True)  # [A, channels]
    if not len(channels):
        raise BadRecording("empty", f"{recording}: empty recording")
    if not np.isfinite(channels).all():
        raise BadRecording("not finite", f"{recording}: samples that are not finite numbers")
    audio_A = channels.mean(axis=1)
    if rate != sample_rate:
        samples = math.ceil(len(audio_A) * (sample_rate / rate))  # in this order: librosa's rounding
        audio_A = soxr.resample(audio_A, rate, sample_rate, quality="HQ")[:samples]
        audio_A = np.pad(audio_A, (0, samples - len(audio_A)))
    if len(audio_A) < min_samples:
        got, wanted = len(audio_A) / sample_rate, min_samples / sample_rate
        raise BadRecording("too short", f"{recording}: {got:.3f} s is too short; expected at least {wanted:.3f} s")
    if np.abs(audio_A).max() < SILENT:
        raise BadRecording("silent", f"{recording}: silent (peak {np.abs(audio_A).max():.1e})")
    return audio_A


@contextlib.contextmanager
def _opened(recording: str | os.PathLike | Stored) -> Iterator:
    """The recording as an open soundfile.SoundFile, or as an object with the methods of it that `load` calls."""
    import soundfile

    try:
        if isinstance(recording, Stored):
            content, rate = recording.read()
            with _Array(content, rate) if rate else soundfile.SoundFile(io.BytesIO(content)) as file:
                yield file
        elif _is_file(recording):
            with soundfile.SoundFile(recording) as file:
                yield file
        else:
            raise BadRecording("missing", f"{recording}: no such audio file")
    except soundfile.LibsndfileError as error:
        what = error.error_string.rstrip(".")
        raise BadRecording(
            "unreadable", f"{recording}: not a readable recording ({what}); expected wav, flac, mp3, ogg or opus"
        ) from None


def _is_file(path: str | os.PathLike) -> bool:
    try:
        return stat.S_ISREG(patiently(lambda: os.stat(path)).st_mode)
    except ReadError:
        raise
    except (OSError, ValueError):  # absent, forbidden, or a name that no file can have
        return False


def _unless_the_machine_fails(recording: str | os.PathLike | Stored, read: Callable[[], T]) -> T:
    """read(), twice before the recording is called unreadable: libsndfile does not tell damage from a disk that fails.

    In between the file is read by other means, which waits until the disk works, or raises ReadError.
    """
    try:
        return read()
    except BadRecording as bad:
        if bad.reason != "unreadable" or isinstance(recording, Stored):
            raise
    patiently(lambda: _read_through(recording))
    return read()


def _read_through(path: str | os.PathLike) -> None:
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass


class _Array(contextlib.nullcontext):
    """Samples in memory with the interface of a soundfile.SoundFile."""

    def __init__(self, samples: np.ndarray, rate: int):
        super().__init__(self)
        self._samples = samples if samples.ndim > 1 else samples[:, None]  # [A, channels]
        self._at = 0
        self.samplerate, (self.frames, self.channels) = rate, self._samples.shape

    def seek(self, frame: int) -> None:
        self._at = frame

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray:
        assert always_2d
        part = self._samples[self._at :][: None if frames < 0 else frames]
        return part.astype(dtype) * np.float32(1 / _full_scale(self._samples))


def _full_scale(samples: np.ndarray) -> float:
    """The stored value that means 1.0. Wider integers are taken for 16-bit samples too, unless one is too large for that."""
    if not np.issubdtype(samples.dtype, np.integer):
        return 1.0
    if samples.dtype.itemsize > 2 and samples.size and np.abs(samples).max() > 2**15:
        return 2.0**31
    return 2.0**15


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


def properties(recording: str | os.PathLike | Stored) -> tuple[int, int]:
    """Sample rate and channels of a recording.

    Raises:
        BadRecording: missing or unreadable.   ReadError: the machine fails to read the file.
    """

    def read() -> tuple[int, int]:
        with _opened(recording) as file:
            return file.samplerate, file.channels

    return _unless_the_machine_fails(recording, read)


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
