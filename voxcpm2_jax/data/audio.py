"""Recordings in and out: load, resample, trim, pad, save, draw. The only file that imports an audio library.

    file -> mean of its channels -> soxr "HQ" at the rate asked for -> checked -> float32 [A]

`load` gives what `librosa.load(path, sr=rate, mono=True)` gives, the reference's loader (a test holds the two together),
from the two libraries underneath it: librosa itself takes seconds to import and is needed for mel filters alone.
"""

import contextlib
import io
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from voxcpm2_jax.config.plain import UserError


class BadRecording(UserError):  # noqa: N818
    """A recording that is of no use; `reason` is one of few words that counts can be kept of."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


SILENT = 1e-4  # peak below which a recording counts as silent (-80 dB)


@dataclass(frozen=True)
class Stored:
    """A recording that lies in a data set and not in a file of its own. It stands where a path would; nothing is read yet.

    Attributes:
        name: what reports call it, and what tells it from others.
        read: -> samples [A] or [A, E] and their rate; or an audio file's content and None.
    """

    name: str
    read: Callable[[], tuple[np.ndarray | bytes, int | None]] = field(compare=False, repr=False)

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
    """A recording, or a part of it, as float32 [A] mono at `sample_rate`. Only that part of a file is decoded.

    Args:
        recording: wav, flac, mp3, ogg or opus, any rate and channel count.   start_sec, end_sec: the part; None: its ends.
        min_samples: shortest result that is of use, at `sample_rate`.   max_sec: longest; more is not decoded.
    Raises:
        BadRecording: missing, unreadable, empty, not finite, silent or too short.
    """
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
        if sec > max_sec:  # before it takes memory
            raise BadRecording("too long", f"{recording}: {sec:.1f} s is too long; expected at most {max_sec:.1f} s")
        audio_AE = file.read(count, dtype="float32", always_2d=True)
    if not len(audio_AE):
        raise BadRecording("empty", f"{recording}: empty recording")
    if not np.isfinite(audio_AE).all():
        raise BadRecording("not finite", f"{recording}: samples that are not finite numbers")
    audio_A = audio_AE.mean(axis=1)
    if rate != sample_rate:
        samples = math.ceil(len(audio_A) * (sample_rate / rate))  # in this order: the reference's rounding
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
    """The recording as an open soundfile.SoundFile, or as something that has the part of its face used here."""
    import soundfile

    try:
        if isinstance(recording, Stored):
            content, rate = recording.read()
            with _Array(content, rate) if rate else soundfile.SoundFile(io.BytesIO(content)) as file:
                yield file
        elif os.path.isfile(recording):  # False too of a name that no file can have
            with soundfile.SoundFile(recording) as file:
                yield file
        else:
            raise BadRecording("missing", f"{recording}: no such audio file")
    except soundfile.LibsndfileError as error:
        what = error.error_string.rstrip(".")
        raise BadRecording(
            "unreadable", f"{recording}: not a readable recording ({what}); expected wav, flac, mp3, ogg or opus"
        ) from None


class _Array(contextlib.nullcontext):
    """Samples in memory with the face of a soundfile.SoundFile."""

    def __init__(self, samples: np.ndarray, rate: int):
        super().__init__(self)
        self._samples_AE = samples if samples.ndim > 1 else samples[:, None]
        self._at = 0
        self.samplerate, (self.frames, self.channels) = rate, self._samples_AE.shape

    def seek(self, frame: int) -> None:
        self._at = frame

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray:
        assert always_2d
        part_AE = self._samples_AE[self._at :][: None if frames < 0 else frames]
        return part_AE.astype(dtype) * np.float32(1 / _full_scale(self._samples_AE))


def _full_scale(samples_AE: np.ndarray) -> float:
    """What a sample of 1.0 is stored as. Integers wider than 16 bits hold 16 bits all the same, unless one is too large."""
    if not np.issubdtype(samples_AE.dtype, np.integer):
        return 1.0
    if samples_AE.dtype.itemsize > 2 and samples_AE.size and np.abs(samples_AE).max() > 2**15:
        return 2.0**31
    return 2.0**15


def pad_to_patches(audio_A: np.ndarray, patch_samples: int, side: str) -> np.ndarray:
    """Adds zeros up to a whole number of patches.

    Args:
        side: "right" for reference audio and training clips, "left" for a prompt that speech continues from.
    """
    assert side in ("left", "right"), side
    missing = -len(audio_A) % patch_samples
    return np.pad(audio_A, (missing, 0) if side == "left" else (0, missing))


def resample(audio_A: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """The same sound at another rate, ceil(A x new / old) samples or one fewer."""
    import soxr

    return audio_A if rate == new_rate else soxr.resample(audio_A.astype(np.float32, copy=False), rate, new_rate, quality="HQ")


def properties(recording: str | os.PathLike | Stored) -> tuple[int, int]:
    """Sample rate and channels of a recording.

    Raises:
        BadRecording: missing or unreadable.
    """
    with _opened(recording) as file:
        return file.samplerate, file.channels


def sound_span(audio_A: np.ndarray, rate: int, *, threshold_db: float = -40.0) -> tuple[int, int]:
    """First and last sample + 1 of the sound: where the RMS of 10 ms is over `threshold_db` relative to the loudest 10 ms."""
    window = max(1, rate // 100)
    blocks = pad_to_patches(audio_A, window, "right").reshape(-1, window)
    power = np.mean(blocks.astype(np.float64) ** 2, axis=1)
    loud = np.flatnonzero(power > power.max(initial=0.0) * 10 ** (threshold_db / 10))
    return (int(loud[0]) * window, min((int(loud[-1]) + 1) * window, len(audio_A))) if len(loud) else (0, len(audio_A))


def trim_silence(audio_A: np.ndarray, rate: int, *, threshold_db: float = -40.0, keep_ms: float = 40.0) -> np.ndarray:
    """Cuts the silence before and after the sound (see `sound_span`).

    Args:
        keep_ms: silence that stays at each end, as far as there is any.
    """
    return cut(audio_A, rate, sound_span(audio_A, rate, threshold_db=threshold_db), keep_ms)


def cut(audio_A: np.ndarray, rate: int, span: tuple[int, int], keep_ms: float) -> np.ndarray:
    keep = round(keep_ms * rate / 1000)
    return audio_A[max(0, span[0] - keep) : span[1] + keep]


def mel_filters(rate: int, window: int, bins: int) -> np.ndarray:
    """librosa's mel filters, float32 [bins, window / 2 + 1]."""
    import librosa

    return librosa.filters.mel(sr=rate, n_fft=window, n_mels=bins)


def save(path: str | os.PathLike, audio_A: np.ndarray, rate: int) -> None:
    """Writes a recording, 16 bits where the format has them, in the format its name ends with; whole or not at all.

    Raises:
        UserError: a directory that cannot be written to, or a format that cannot be written.
    """
    import soundfile

    path = pathlib.Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        soundfile.write(aside, audio_A, rate)
        aside.replace(path)
    except (soundfile.LibsndfileError, OSError, TypeError, ValueError) as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise UserError(f"{path}: cannot be written ({error})") from None
