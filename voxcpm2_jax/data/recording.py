"""Opening recordings: a file, the content of a file, or samples, behind one interface.

libsndfile    wav, flac, mp3, ogg, opus, aiff, caf, au, w64, sph; with its header mended where it lies (container.py)
PyAV          m4a, mp4, webm, mka, aac, amr, wma ...: whatever libsndfile cannot open, if PyAV is installed
"""

import contextlib
import importlib.util
import io
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

import numpy as np

from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.data.container import Length, Mended, look
from voxcpm2_jax.data.records import ReadError, patiently

if TYPE_CHECKING:
    from voxcpm2_jax.data.decoders import Array, File, Stream

T = TypeVar("T")


class BadRecording(UserError):  # noqa: N818
    """A recording that cannot be used; `reason` is one of a few fixed words, under which such recordings are counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Stored:
    """A recording inside a data set, not in a file of its own. It is used in place of a path and read when it is loaded.

    Attributes:
        name: unique; shown in reports.
        read: returns samples, [A] or [A, channels], and their rate; or the content of an audio file and None.
        place: where it lies, whatever split of the set it is read in; empty: the name tells.
        is_rate_guessed: the set does not state the rate.
    """

    name: str
    read: Callable[[], tuple[np.ndarray | bytes, int | None]] = field(compare=False, repr=False)
    place: str = ""
    is_rate_guessed: bool = False

    def __str__(self) -> str:
        return self.name


class Opened(NamedTuple):
    """A recording whose samples can be read: from a source (decoders.py), of a length as header and bytes tell."""

    source: "File | Stream | Array"
    length: Length

    @property
    def said_sec(self) -> float | None:
        """What the header states; None: nothing."""
        frames, (said, there, *_) = self.source.frames, self.length
        if said is None or not frames:
            return None
        return frames * (said / there if there else 1) / self.source.samplerate


@contextlib.contextmanager
def opened(recording: str | os.PathLike | Stored) -> Iterator[Opened]:
    """Opens a recording.

    Raises:
        BadRecording: missing or unreadable.   ReadError: the machine fails.
    """
    from voxcpm2_jax.data import decoders

    with contextlib.ExitStack() as stack:
        if isinstance(recording, Stored):
            content, rate = recording.read()
            if rate:
                yield Opened(decoders.Array(content, rate), Length())
                return
            file = io.BytesIO(content)
        elif _is_file(recording):
            file = stack.enter_context(_open(recording))
        else:
            raise BadRecording("missing", f"{recording}: no such audio file")
        found = _decoder(recording, file)
        stack.enter_context(found.source)
        yield found


def unless_the_machine_fails(recording: str | os.PathLike | Stored, read: Callable[[], T]) -> T:
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


def _is_file(path: str | os.PathLike) -> bool:
    try:
        return stat.S_ISREG(patiently(lambda: os.stat(path)).st_mode)
    except ReadError:
        raise
    except (OSError, ValueError):  # absent, forbidden, or a name that no file can have
        return False


def _open(path: str | os.PathLike) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise BadRecording("unreadable", f"{path}: cannot be read ({error.strerror})") from None


# ---- decoders ----------------------------------------------------------------------------------------------------------


def _decoder(recording: str | os.PathLike | Stored, file: BinaryIO) -> Opened:
    import soundfile

    from voxcpm2_jax.data import decoders

    plain = file if isinstance(recording, Stored) else os.fspath(recording)
    try:
        length = look(file) if isinstance(recording, Stored) else _look_once(file)
        file.seek(0)
        return Opened(decoders.File(Mended(file, length) if length.patches or length.front else plain), length)
    except OSError as error:
        raise BadRecording("unreadable", f"{recording}: cannot be read ({error.strerror})") from None
    except soundfile.LibsndfileError as error:
        what = error.error_string.rstrip(".")
    if guess := _no_audio(file):
        raise BadRecording("unreadable", f"{recording}: not a recording but {guess}")
    if importlib.util.find_spec("av") is None:
        raise BadRecording(
            "unreadable",
            f"{recording}: not a readable recording ({what}); expected wav, flac, mp3, ogg or opus; m4a, webm and others need "
            "PyAV: pip install 'voxcpm2-jax[containers]'",
        )
    file.seek(0)
    try:
        source = decoders.Stream(plain)
        return Opened(source, Length(source.frames, source.frames))
    except decoders.DecodeError as error:
        raise BadRecording(
            "unreadable",
            f"{recording}: not a readable recording ({what}; {error}); expected wav, flac, mp3, ogg, opus, m4a or webm",
        ) from None


_LENGTHS: dict[tuple[int, ...], Length] = {}  # of files, since many clips are parts of one
_MOST_LENGTHS = 4096


def _look_once(file: BinaryIO) -> Length:
    is_ = os.fstat(file.fileno())
    key = (is_.st_dev, is_.st_ino, is_.st_size, is_.st_mtime_ns)
    if (length := _LENGTHS.get(key)) is None:
        if len(_LENGTHS) >= _MOST_LENGTHS:
            _LENGTHS.clear()
        length = _LENGTHS[key] = look(file)
    return length


def _no_audio(file: BinaryIO) -> str:
    """What people get in place of a recording, by the first bytes; empty: something else."""
    file.seek(0)
    head = file.read(256).lstrip().lower()
    known = {
        b"version https://git-lfs": "a pointer of Git LFS; fetch the file with `git lfs pull`",
        b"<!doctype html": "a web page, perhaps of a failed download",
        b"<html": "a web page, perhaps of a failed download",
        b"<?xml": "an XML document, perhaps of a failed download",
        b"\x1f\x8b": "a gzip archive; unpack it",
        b"pk\x03\x04": "a zip archive; unpack it",
    }
    return next((what for begin, what in known.items() if head.startswith(begin)), "")
