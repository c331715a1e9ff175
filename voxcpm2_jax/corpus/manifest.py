"""Manifests: JSON lines, one object per recording.

Fine-tuning manifests of the PyTorch package are read as they are; the keys from `dataset` on are additions:

    {"audio": "wav/00001.wav", "text": "three seven two", "ref_audio": "wav/00007.wav", "duration": 1.2,
     "ref_duration": 1.0, "dataset_id": 0, "is_prompt": false, "dataset": "demo", "language": "en", "speaker": "heart",
     "session": "a", "description": "a calm woman", "start_sec": 0.5, "end_sec": 1.7, "order": 17}

Only `audio` and `text` are required. Paths are relative to the manifest, which may lie in a bucket, or URLs (gs://, s3://):
recordings in buckets are read when they are needed and not kept. Unknown keys are ignored, unless they look like a
misspelt known one. Numbers may be written as text and text as numbers; null and "" mean none; `audio` may be {"path": ..}.
"""

import array
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import pathlib
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from voxcpm2_jax import files
from voxcpm2_jax.buckets import stage, store
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.config.text import with_description
from voxcpm2_jax.data import audio
from voxcpm2_jax.data.identity import identity
from voxcpm2_jax.data.records import ReadError, patiently

TFDS = "tfds:"  # a name that begins with it is a TensorFlow data set, not a manifest
TRAIN, HELDOUT = "train.jsonl", "heldout.jsonl"  # manifests of an embedded corpus


@dataclass(frozen=True)
class Recording:
    """One clip of a corpus, not yet loaded."""

    audio: pathlib.Path | audio.Stored
    text: str
    ref_audio: pathlib.Path | audio.Stored | None = None  # another recording of the same voice
    duration: float | None = None  # s, a hint
    ref_duration: float | None = None  # s, a hint that only the PyTorch package reads
    dataset_id: int = 0
    is_prompt: bool = False  # a prompt clip, which bears no loss
    dataset: str | None = None
    language: str | None = None
    speaker: str | None = None
    session: str | None = None
    description: str | None = None  # of voice or style; put in parentheses before the text
    start_sec: float | None = None  # the clip is this part of the file; None: its beginning, its end
    end_sec: float | None = None
    order: float | None = None  # grows from clip to clip of a speaker and session, in the order of recording

    @property
    def full_text(self) -> str:
        """The text with its description, as it is tokenized."""
        return with_description(self.description, self.text)

    @property
    def identity(self) -> tuple:
        """Its IDENTITY (data/identity.py): the same wherever the manifest lies, as long as the recording stays."""
        file = self.audio.place or str(self.audio) if isinstance(self.audio, audio.Stored) else os.path.abspath(self.audio)
        return identity(file, self.start_sec, self.end_sec, self.dataset or str(self.dataset_id), self.speaker)


_KEYS = {field.name: field for field in dataclasses.fields(Recording)}
_NUMBERS = {"dataset_id": int, "is_prompt": bool} | dict.fromkeys(
    ("duration", "ref_duration", "start_sec", "end_sec", "order"), float
)  # all other values are text
# What others call these fields: NeMo, Common Voice, aligners, and data sets on the Hugging Face hub.
_ALIASES = {
    "audio": ("audio_filepath", "audio_path", "audio_file", "file_name", "wav", "wav_path", "path"),
    "text": ("sentence", "transcript", "transcription"),
    "speaker": ("speaker_id", "speaker_name", "client_id"),
    "language": ("locale", "lang"),
    "start_sec": ("start", "start_time"),
    "end_sec": ("end", "end_time"),
}
KNOWN = frozenset(_KEYS) | {"offset", *(alias for aliases in _ALIASES.values() for alias in aliases)}


# ---- one entry -------------------------------------------------------------------------------------------------------


def has_fields(names: Iterable[str]) -> bool:
    """Whether entries with these keys can be recordings: they name the audio and the text."""
    return all(any(name in names for name in (key, *_ALIASES[key])) for key in ("audio", "text"))


def recording_of(entry, root: pathlib.Path | str) -> Recording:
    """The recording of one entry of a manifest; `root` is the directory of relative paths, or its URL.

    Raises:
        UserError: what is wrong with the entry.
    """
    if not isinstance(entry, dict):
        raise UserError(f"expected an object, got {entry!r:.80}")
    given = entry if entry.keys() <= _KEYS.keys() else _renamed(entry)
    fields = {key: found for key, value in given.items() if (found := _value(key, value)) is not None}
    for key in ("audio", "text"):
        if key not in fields:
            raise UserError(f"no {key}; its keys are {', '.join(map(str, entry)) or 'none'}")
    start, end = fields.get("start_sec", 0.0), fields.get("end_sec")
    if start < 0 or (end is not None and end <= start):
        raise UserError(f"start_sec {start} and end_sec {end} do not bound a part; expected 0 <= start_sec < end_sec")
    for key in fields.keys() & {"audio", "ref_audio"}:
        fields[key] = _audio(root, fields[key])
    return Recording(**fields)


def _renamed(entry: dict) -> dict:
    """An entry with the names that our manifests have, and without what they do not know."""
    for key in entry.keys() - KNOWN:
        if close := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85):
            raise UserError(f"unknown key {key!r}; did you mean {close[0]!r}?")
    given = {key: entry[key] for key in entry.keys() & _KEYS.keys()}
    for key, aliases in _ALIASES.items():
        if key not in given and (alias := next((name for name in aliases if name in entry), None)):
            given[key] = entry[alias]
    if (offset := _number("offset", entry.get("offset"), float)) is not None and "start_sec" not in given:  # NeMo
        length = _number("duration", entry.get("duration"), float)
        given |= {"start_sec": offset, "end_sec": None if length is None else offset + length}
    return given


def _value(key: str, value):
    """A value as its field has it; None for what stands for none: null, an empty text, NaN in place of a text."""
    if kind := _NUMBERS.get(key):
        return _number(key, value, kind)
    if key in ("audio", "ref_audio") and isinstance(value, dict):  # {"path": ..}, of Hugging Face
        if not isinstance(value.get("path"), str):
            raise UserError(f"{key} has no path: {value!r:.80}")
        value = value["path"]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value) if value == value // 1 else value)
    if not isinstance(value, str):
        raise UserError(f"{key} must be str, got {value!r:.80}")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{key} is not valid Unicode: {value!r:.80}")
    return value if value.strip() else None


_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _number(key: str, value, kind: type) -> int | float | bool | None:
    """A number or flag, which may be written as text; None if there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if kind is bool:
        found = _FLAGS.get(str(value).strip().lower())
    else:
        try:
            found = None if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            found = None
        if found is not None and not math.isfinite(found):
            raise UserError(f"{key} must be a finite number, got {value}")
        if kind is int and found is not None:
            found = int(found) if found.is_integer() else None
    if found is None:
        raise UserError(f"{key} must be {kind.__name__}, got {value!r:.80}")
    return found


def root_of(path: str | os.PathLike) -> pathlib.Path | str:
    """The directory that paths in a list are relative to; a URL if the list lies in a bucket."""
    return str(path).rpartition("/")[0] if store.is_url(path) else pathlib.Path(path).parent


def _audio(root: pathlib.Path | str, name: str) -> pathlib.Path | audio.Stored:
    if not store.is_url(name) and isinstance(root, pathlib.Path):
        return _existing(root / name)
    url = name if store.is_url(name) else store.join(root, name)
    return audio.Stored(url, functools.partial(_read_object, url))


def _read_object(url: str) -> tuple[bytes, None]:
    try:
        return store.read(url), None
    except store.Missing as error:
        raise audio.BadRecording("missing", str(error)) from None
    except store.Unreachable as error:
        raise ReadError(str(error)) from None


def _existing(path: pathlib.Path) -> pathlib.Path:
    """The path, with its letters in the Unicode form that the disk has them in, and slashes for backslashes."""
    if (str(path).isascii() and "\\" not in str(path)) or os.path.exists(path):
        return path
    found = pathlib.Path()
    for part in pathlib.Path(str(path).replace("\\", "/")).parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        found /= next((form for form in forms if os.path.exists(found / form)), part)
    return found if os.path.exists(found) else path


# ---- all entries -----------------------------------------------------------------------------------------------------


class Manifest(Sequence):
    """The recordings of a manifest, in its order. Memory holds only the position of each line; no audio is opened.

    Attributes:
        name: its path.   sha256: of the file.   num_faults: lines that are left out, because they are no recordings.
    Raises:
        UserError: no such file, or an empty one.   ReadError: the machine fails to read it.
    """

    def __init__(self, path: str | os.PathLike, *, root: pathlib.Path | str | None = None, name: str | None = None):
        self.path, self.name = pathlib.Path(stage.local(path)), name or str(path)
        self._root = root_of(path) if root is None else root
        try:
            self._begins, self._faulty, self.sha256 = patiently(self._scan)
        except FileNotFoundError:
            raise UserError(f"{path}: no such manifest") from None
        except ReadError:
            raise
        except OSError as error:
            raise UserError(f"{path}: not a manifest ({error}); expected JSON lines in UTF-8") from None
        self.num_faults = len(self._faulty)
        if not len(self) and not self.num_faults:
            raise UserError(f"{self.name}: empty manifest")

    def _scan(self) -> tuple[np.ndarray, list[tuple[int, int]], str]:
        """Where each usable line begins; number and beginning of each faulty one; the hash of the file."""
        digest, begins, faulty, at = hashlib.sha256(), array.array("q"), [], 0
        with self.path.open("rb") as file:
            if b"\0" in file.read(4096):
                raise UserError(f"{self.name}: binary data, or UTF-16; expected a list of recordings in UTF-8, as JSON lines")
            file.seek(0)
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip(_BLANK):
                    try:
                        self._recording(line)
                        begins.append(at)
                    except UserError:
                        faulty.append((number, at))
                at += len(line)
        return np.array(begins), faulty, digest.hexdigest()

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index):
        begins = self._begins[index]
        if isinstance(index, slice):
            return patiently(lambda: self._read(begins)) if len(begins) else []
        return patiently(lambda: self._read([begins]))[0]

    def _read(self, begins: Iterable[int]) -> list[Recording]:
        found = []
        with self.path.open("rb") as file:
            for begin in begins:
                file.seek(begin)
                found.append(self._recording(file.readline()))
        return found

    def __iter__(self) -> Iterator[Recording]:
        for start in range(0, len(self), 1024):
            yield from self[start : start + 1024]

    def faults(self) -> Iterator[tuple[str, str]]:
        """Every line that is left out: its place, and what is wrong with it."""
        with self.path.open("rb") as file:
            for number, begin in self._faulty:
                file.seek(begin)
                line = file.readline()
                try:
                    self._recording(line)
                except UserError as error:
                    yield f"{self.name}:{self._place(number, line)}", str(error)

    def _place(self, number: int, line: bytes) -> str:
        return str(number)

    def _recording(self, line: bytes) -> Recording:
        return recording_of(_parsed(line), self._root)


_BLANK = b" \t\r\n\xef\xbb\xbf"  # a byte-order mark included, which some editors write in front


def _parsed(line: bytes):
    try:
        return json.loads(line.strip(_BLANK))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error})") from None


class Listed(Manifest):
    """Recordings that are listed in another format, as entries of a manifest. These are kept in a temporary file.

    Args:
        name: of the list.   root: the directory of relative paths.
        entries: (place, entry), or (place, what is wrong with it).
        stored: returns the audio of an entry whose `audio` is a number in the list; None: they are files.
    """

    def __init__(
        self, name: str, root: pathlib.Path | str, entries: Iterable[tuple[str, dict | str]], stored: Callable | None = None
    ):
        self._stored = stored
        self._file = tempfile.NamedTemporaryFile(prefix="voxcpm2-jax-", suffix=".jsonl")  # noqa: SIM115 - kept with the object
        for line in entries:
            self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        super().__init__(self._file.name, root=root, name=name)

    def _place(self, number: int, line: bytes) -> str:
        return json.loads(line)[0]

    def _recording(self, line: bytes) -> Recording:
        _, entry = json.loads(line)
        if isinstance(entry, str):
            raise UserError(entry)
        recording = recording_of({key: value for key, value in entry.items() if key in KNOWN}, self._root)
        return dataclasses.replace(recording, audio=self._stored(entry["audio"])) if self._stored else recording


def read_manifest(path: str | os.PathLike) -> list[Recording]:
    """All recordings of a manifest at once; raises as `Manifest`, and for a faulty line."""
    found = Manifest(path)
    for where, message in found.faults():
        raise UserError(f"{where}: {message}")
    return list(found)


def write_manifest(path: str | os.PathLike, recordings: Iterable[Recording]) -> None:
    """Writes a manifest; paths below its directory become relative to it."""
    root = pathlib.Path(path).parent.resolve()
    with files.aside(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for recording in recordings:
            entry = {k: v for k, v in vars(recording).items() if v != _KEYS[k].default}
            for key in entry.keys() & {"audio", "ref_audio"}:
                target = pathlib.Path(entry[key]).resolve()
                entry[key] = str(target.relative_to(root) if target.is_relative_to(root) else target)
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def write_split(directory: pathlib.Path, train: list[Recording], heldout: list[Recording]) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the two manifests of an embedded corpus -> their paths. Without held-out clips it writes only the first."""
    if heldout:
        write_manifest(directory / HELDOUT, heldout)
    write_manifest(directory / TRAIN, train)
    return directory / TRAIN, directory / HELDOUT
