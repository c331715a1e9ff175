"""Manifests: JSON lines, one object per recording.

Fine-tuning manifests of the PyTorch package are read as they are; the keys from `dataset` on are additions:

    {"audio": "wav/00001.wav", "text": "three seven two", "ref_audio": "wav/00007.wav", "duration": 1.2,
     "ref_duration": 1.0, "dataset_id": 0, "is_prompt": false, "dataset": "demo", "language": "en", "speaker": "heart",
     "session": "a", "description": "a calm woman", "start_sec": 0.5, "end_sec": 1.7, "order": 17}

Only `audio` and `text` are required. Paths are relative to the manifest, which may lie in a bucket, or URLs (gs://, s3://):
recordings in buckets are read when they are needed and not kept. Unknown keys are ignored, unless they look like a
misspelt known one.
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
from collections.abc import Iterable, Iterator, Sequence
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
_TYPES = {"audio": str, "text": str, "ref_audio": str, "dataset_id": int, "is_prompt": bool, "duration": float,
          "ref_duration": float, "start_sec": float, "end_sec": float, "order": float}  # fmt: skip


class Manifest(Sequence):
    """The recordings of a manifest, in its order. Memory holds only the position of each line; no audio is opened.

    Attributes:
        name: its path.   sha256: of the file.
    Raises:
        UserError: no such file, or a faulty line, with its number.   ReadError: the machine fails to read it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.name = pathlib.Path(stage.local(path)), str(path)
        self._root = self.name.rpartition("/")[0] if store.is_url(path) else self.path.parent
        try:
            self._begins, self.sha256 = patiently(self._scan)
        except FileNotFoundError:
            raise UserError(f"{path}: no such manifest") from None
        except ReadError:
            raise
        except OSError as error:
            raise UserError(f"{path}: not a manifest ({error}); expected JSON lines in UTF-8") from None
        if not len(self._begins):
            raise UserError(f"{path}: empty manifest")

    def _scan(self) -> tuple[np.ndarray, str]:
        """Where each line begins, and the hash of the file."""
        digest, begins, at = hashlib.sha256(), array.array("q"), 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    _recording(line, self._root, f"{self.name}:{number}")
                    begins.append(at)
                at += len(line)
        return np.array(begins), digest.hexdigest()

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
                found.append(_recording(file.readline(), self._root, self.name))
        return found

    def __iter__(self) -> Iterator[Recording]:
        with self.path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield _recording(line, self._root, self.name)


def read_manifest(path: str | os.PathLike) -> list[Recording]:
    """All recordings of a manifest at once; raises as `Manifest`."""
    return list(Manifest(path))


def _audio(root: pathlib.Path | str, name: str) -> pathlib.Path | audio.Stored:
    """A recording that a manifest names, where paths are relative to `root`, a directory or a URL."""
    if not store.is_url(name) and isinstance(root, pathlib.Path):
        return root / name
    url = name if store.is_url(name) else store.join(root, name)
    return audio.Stored(url, functools.partial(_read_object, url))


def _read_object(url: str) -> tuple[bytes, None]:
    try:
        return store.read(url), None
    except store.Missing as error:
        raise audio.BadRecording("missing", str(error)) from None
    except store.Unreachable as error:
        raise ReadError(str(error)) from None


def _recording(line: bytes, root: pathlib.Path | str, where: str) -> Recording:
    try:
        entry = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not a manifest ({error}); expected JSON lines in UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected an object, got {line.decode().strip():.80}")
    for key in entry.keys() - _KEYS.keys():
        if close := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85):
            raise UserError(f"{where}: unknown key {key!r}; did you mean {close[0]!r}?")
    fields = {}
    for key in entry.keys() & _KEYS.keys():
        value, kind = entry[key], _TYPES.get(key, str)
        if value is None and _KEYS[key].default is not dataclasses.MISSING:
            continue
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if kind is bool and value in (0, 1):
            value = bool(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{where}: {key} must be {kind.__name__}, got {value!r}")
        if kind is float and not math.isfinite(value):
            raise UserError(f"{where}: {key} must be a finite number, got {value}")
        if kind is str and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise UserError(f"{where}: {key} is not valid Unicode: {value!r:.80}")
        fields[key] = _audio(root, value) if key in ("audio", "ref_audio") else value
    for key in ("audio", "text"):
        if not str(entry.get(key, "")).strip():
            raise UserError(f"{where}: no {key}")
    start, end = fields.get("start_sec", 0.0), fields.get("end_sec")
    if start < 0 or (end is not None and end <= start):
        raise UserError(f"{where}: start_sec {start} and end_sec {end} do not bound a part; expected 0 <= start_sec < end_sec")
    return Recording(**fields)


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
