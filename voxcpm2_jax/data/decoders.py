"""What samples are read from: `samplerate`, `channels`, `frames` (None: not known), `seek(frame)`, and `read(frames)`, which
returns float32 [at most that many, channels], fewer only at the end."""

import contextlib
from collections.abc import Iterator

import numpy as np
import soundfile

BLOCK = 1 << 16  # frames
_GUESSED = {"aac", "ac3", "amr", "dts", "eac3", "loas", "mp3"}  # no container: FFmpeg guesses their length by their bit rate


class DecodeError(Exception):
    """The content is damaged, or of no known kind."""


class File(soundfile.SoundFile):
    """A soundfile.SoundFile that also reads containers of unknown length, and seeks in those that cannot."""

    def seekable(self) -> bool:
        return False  # else every `read` seeks, which fails at the end of a file whose length is not known

    def seek(self, frame: int) -> None:
        if self._info.seekable:
            super().seek(frame)
        else:
            _skip(self, frame)

    def read(self, frames: int) -> np.ndarray:
        try:
            return super().read(frames, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise DecodeError(error.error_string.rstrip(".")) from None


def _skip(source, frames: int) -> None:
    while frames > 0 and len(skipped := source.read(min(frames, BLOCK))):
        frames -= len(skipped)


class Stream:
    """The first audio stream of whatever PyAV opens: m4a, mp4, webm, mka, aac, amr, wma ...

    Args:
        file: a path, or an open file.
    Raises:
        DecodeError: nothing that it knows, or nothing with audio.
    """

    def __init__(self, file):
        import av

        self._stack = contextlib.ExitStack()
        with self._stack:
            with _damage(av):
                self._container = self._stack.enter_context(av.open(file, metadata_errors="ignore"))
            if not self._container.streams.audio:
                raise DecodeError("no audio in it")
            self._stream = self._container.streams.audio[0]
            self._blocks = self._decoded()
            self._rest = next(self._blocks, None)
            if self._rest is None:
                raise DecodeError("no audio in it")
            self.frames = self._stated_frames()
            self._stack = self._stack.pop_all()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _stated_frames(self) -> int | None:
        stream, container = self._stream, self._container
        if container.format.name in _GUESSED:
            return None
        if stream.duration is not None:
            return round(stream.duration * stream.time_base * self.samplerate)
        return None if container.duration is None else round(container.duration / 1e6 * self.samplerate)

    def seek(self, frame: int) -> None:
        """Goes back half a second further, from where decoders find their way."""
        import av

        sec = frame / self.samplerate
        with _damage(av):
            self._container.seek(int(max(0.0, sec - 0.5) * 1e6) + (self._container.start_time or 0))
        self._blocks = self._decoded()
        self._rest = next(self._blocks, np.zeros((0, self.channels), np.float32))
        _skip(self, max(0, frame - self._at))

    def read(self, frames: int) -> np.ndarray:
        parts, missing = [], frames
        while missing > 0 and len(self._rest):
            parts.append(self._rest[:missing])
            missing -= len(parts[-1])
            self._rest = self._rest[len(parts[-1]) :]
            if not len(self._rest):
                self._rest = next(self._blocks, self._rest)
        return np.concatenate(parts) if parts else np.zeros((0, self.channels), np.float32)

    def _decoded(self) -> Iterator[np.ndarray]:
        """The audio from the current place on; sets the rate, the channels, and the number of the first frame."""
        import av

        plain = is_first = None
        with _damage(av):
            for frame in self._container.decode(self._stream):
                if is_first is None:
                    self.samplerate, self.channels = frame.sample_rate, frame.layout.nb_channels
                    plain = av.AudioResampler("fltp", frame.layout, frame.sample_rate)
                    start = self._stream.start_time or 0
                    self._at = round(((frame.pts or start) - start) * (frame.time_base or 0) * frame.sample_rate)
                    is_first = False
                for block in plain.resample(frame):
                    yield block.to_ndarray().T
            for block in plain.resample(None) if plain else ():
                yield block.to_ndarray().T


@contextlib.contextmanager
def _damage(av) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, ValueError) as error:  # ValueError: a format that PyAV cannot convert
        raise DecodeError(getattr(error, "strerror", None) or str(error)) from None


class Array(contextlib.nullcontext):
    """Samples in memory, [A] or [A, channels]."""

    def __init__(self, samples: np.ndarray, rate: int):
        super().__init__(self)
        self._samples = samples if samples.ndim > 1 else samples[:, None]
        self._at = 0
        self._unit = np.float32(1 / _full_scale(samples))
        self.samplerate, (self.frames, self.channels) = rate, self._samples.shape

    def seek(self, frame: int) -> None:
        self._at = frame

    def read(self, frames: int) -> np.ndarray:
        part = self._samples[self._at : self._at + frames]
        self._at += len(part)
        return part.astype(np.float32) * self._unit


def _full_scale(samples: np.ndarray) -> float:
    """The stored value that means 1.0. Wider integers are taken for 16-bit samples too, unless one is too large for that."""
    if not np.issubdtype(samples.dtype, np.integer):
        return 1.0
    if samples.dtype.itemsize > 2 and samples.size and np.abs(samples).max() > 2**15:
        return 2.0**31
    return 2.0**15
