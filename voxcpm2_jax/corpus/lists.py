"""Lists of recordings in the formats of others, as entries of a manifest (manifest.Listed).

metadata.csv      LJSpeech: ID|text|normalised text, audio in wavs/ID.wav; or PATH|text
*.csv, *.tsv      with a header that names the columns: Common Voice (audio in clips/), Hugging Face audio folders, your own
DIRECTORY         Kaldi: wav.scp, text, and if present segments, utt2spk, utt2lang
*.json, *.gz      a JSON array of entries; JSON lines, compressed
*.jsonl, *.gz     cuts of lhotse (extra "lhotse")
DIRECTORY         a Hugging Face data set that `save_to_disk` wrote (extra "datasets"); @SPLIT chooses one of its splits
"""

import csv
import gzip
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from functools import partial

from voxcpm2_jax.buckets import stage, store
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.corpus.manifest import KNOWN, Listed, Manifest, has_fields, root_of
from voxcpm2_jax.data import audio

_Entries = Iterable[tuple[str, dict | str]]  # place, and entry or what is wrong with it


def open_list(name: str | os.PathLike) -> Manifest:
    """The recordings of a manifest or of a list in another format; faulty entries are left out.

    Raises:
        UserError: no such file or directory, of no known format, or empty.
    """
    name, split, suffix = str(name), None, pathlib.Path(name).suffix.lower()
    path, root = pathlib.Path(stage.local(name)), root_of(name)
    if not path.exists() and (at := name.rpartition("@"))[1] and os.path.isdir(at[0]):
        path, split = pathlib.Path(at[0]), at[2]
    try:
        if path.is_dir() and not store.is_url(name):
            return _open_directory(name, path, split)
        if path.is_file() and suffix in (".csv", ".tsv", ".txt"):
            with path.open("rb") as file:
                is_json = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
            return Manifest(name) if is_json else Listed(name, root, _table(path, root))
        if path.is_file() and suffix in (".gz", ".json", ".jsonl", ".ndjson"):
            return _open_json(name, path, root, is_packed=suffix == ".gz")
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile, PermissionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a list of recordings in UTF-8") from None
    return Manifest(name)


def _open_directory(name: str, path: pathlib.Path, split: str | None) -> Manifest:
    if (path / "wav.scp").is_file():
        return Listed(name, path, _kaldi(path))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_dataset(name, path, split)
    for file in ("metadata.jsonl", "metadata.csv"):
        if (path / file).is_file():
            return open_list(path / file)
    raise UserError(
        f"{path}: a directory of no known format; expected Kaldi's (wav.scp, text), one that datasets.save_to_disk wrote "
        "(state.json), LJSpeech's (metadata.csv), or a file that lists recordings"
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def _table(path: pathlib.Path, root: pathlib.Path | str) -> Iterator[tuple[str, dict | str]]:
    """The rows of a CSV or TSV file."""
    csv.field_size_limit(1 << 24)
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        delimiter = next((mark for mark in ("\t", "|", ";") if mark in first), ",")
        has_quotes = delimiter in ",;"  # which bound cells; the texts of the others have quotes of their own
        columns = [column.strip().strip('"').lower() for column in first.rstrip("\r\n").split(delimiter)]
        has_header = has_fields(columns)
        if not has_header and delimiter != "|":
            raise UserError(
                f"{path}: its first line must name the columns, among them audio and text, got {first.strip()!r:.80}"
            )
        rows = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE)
        if has_header:
            next(rows)
        clips = _clips(root, columns) if has_header else None
        for row in rows:
            place = str(rows.line_num)
            if not any(cell.strip() for cell in row):
                continue
            if not has_header:
                yield place, _bare_row(row)
            elif len(row) != len(columns):
                yield place, f"{len(row)} columns, the header has {len(columns)}"
            else:
                cells = row if has_quotes or clips else map(_unquoted, row)
                entry = dict(zip(columns, cells))
                yield place, (entry | {"path": clips(entry["path"])}) if clips and entry["path"] else entry


def _clips(root: pathlib.Path | str, columns: list[str]):
    """For Common Voice: where its `path` lies, relative to the list."""
    if not {"client_id", "path", "sentence"} <= set(columns):
        return None
    folder = "" if isinstance(root, pathlib.Path) and not (root / "clips").is_dir() else "clips/"
    return lambda name: f"{folder}{name if pathlib.Path(name).suffix else name + '.mp3'}"  # old releases leave the suffix out


def _bare_row(row: list[str]) -> dict | str:
    """A row without header: LJSpeech's ID|text|normalised text, or PATH|..|text."""
    if len(row) < 2:
        return f"{len(row)} columns; expected ID|text or ID|text|normalised text"
    name = row[0].strip()
    texts = [cell for cell in row[1:] if cell.strip()]
    return {"audio": name if pathlib.Path(name).suffix else f"wavs/{name}.wav", "text": texts[-1] if texts else ""}


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


# ---- Kaldi -----------------------------------------------------------------------------------------------------------


def _kaldi(directory: pathlib.Path) -> Iterator[tuple[str, dict | str]]:
    sounds = _keyed(directory / "wav.scp")
    texts = _keyed(directory / "text")
    speakers, languages = (_keyed(directory / name, is_needed=False) for name in ("utt2spk", "utt2lang"))
    segments = _keyed(directory / "segments", is_needed=False) if (directory / "segments").is_file() else None
    for key in texts if segments is None else segments:
        recording, bounds = key, {}
        if segments is not None:
            parts = segments[key].split()
            if len(parts) != 3:
                yield key, f"segments: expected RECORDING START END, got {segments[key]!r:.80}"
                continue
            recording, start, end = parts
            bounds = {"start_sec": start} | ({} if end == "-1" else {"end_sec": end})
        place = sounds.get(recording)
        if place is None:
            yield key, f"wav.scp has no recording {recording}"
        elif place.endswith("|") or re.search(r"\.ark:\d+$", place):
            yield (
                key,
                f"its audio is {'a command' if place.endswith('|') else 'inside an archive'}: {place:.80}; write it to a file",
            )
        else:
            named = {"speaker": speakers.get(key), "language": languages.get(key)}
            yield key, {"audio": _found(directory, place), "text": texts.get(key, ""), **bounds, **named}


def _found(directory: pathlib.Path | str, place: str) -> str:
    """A path beside the list, or else relative to where the recipe runs that wrote it."""
    is_beside = isinstance(directory, str) or (directory / place).exists()
    return place if is_beside or not os.path.exists(place) else os.path.abspath(place)


def _keyed(path: pathlib.Path, *, is_needed: bool = True) -> dict[str, str]:
    """The lines of a file of Kaldi by their first word."""
    if not is_needed and not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); Kaldi's directories have wav.scp and text") from None
    return {key: rest.strip() for key, _, rest in (line.strip().replace("\t", " ", 1).partition(" ") for line in lines) if key}


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _open_json(name: str, path: pathlib.Path, root: pathlib.Path | str, *, is_packed: bool) -> Manifest:
    """JSON lines, compressed or not, an array of entries, or cuts of lhotse."""
    with gzip.open(path, "rb") if is_packed else path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"").lstrip(b"\xef\xbb\xbf \t")
    try:
        kind = json.loads(first).get("type", "")
    except (ValueError, AttributeError, RecursionError):
        kind = ""
    if str(kind).endswith("Cut"):
        return Listed(name, root, _cuts(path, root))
    if first.startswith(b"["):
        return Listed(name, root, _array(path, is_packed))
    return Listed(name, root, _lines(path)) if is_packed else Manifest(name)


def _array(path: pathlib.Path, is_packed: bool) -> _Entries:
    with gzip.open(path, "rb") if is_packed else path.open("rb") as file:
        try:
            entries = json.loads(file.read().decode("utf-8-sig"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
    return ((str(number), _object(entry)) for number, entry in enumerate(entries, 1))


def _lines(path: pathlib.Path) -> _Entries:
    with gzip.open(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield str(number), _object(json.loads(line))
                except json.JSONDecodeError as error:
                    yield str(number), f"not valid JSON ({error})"


def _object(entry) -> dict | str:
    return entry if isinstance(entry, dict) else f"expected an object, got {entry!r:.80}"


# ---- lhotse ----------------------------------------------------------------------------------------------------------


def _cuts(path: pathlib.Path, root: pathlib.Path | str) -> _Entries:
    """Every supervision of every cut is a clip."""
    lhotse = _library("lhotse", path, "cuts of lhotse")
    for cut in lhotse.load_manifest_lazy(path):
        if not isinstance(cut, lhotse.MonoCut) or not cut.has_recording:
            yield cut.id, f"a {type(cut).__name__} of no single recording; expected a MonoCut with a recording"
            continue
        (source, *others), sound = cut.recording.sources, cut.recording
        if source.type != "file" or others or sound.transforms:
            what = "transforms" if sound.transforms else f"{1 + len(others)} sources, the first of type {source.type!r}"
            yield cut.id, f"its recording has {what}; write it to a file (CutSet.save_audios)"
            continue
        for part in cut.supervisions:
            start, end = cut.start + part.start, cut.start + part.end
            bounds = {} if start == 0 and end >= sound.duration else {"start_sec": start, "end_sec": end}
            fields = {
                "audio": _found(root, source.source),
                "text": part.text or "",
                "speaker": part.speaker,
                "language": part.language,
            }
            yield part.id, fields | bounds


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def _open_dataset(name: str, path: pathlib.Path, split: str | None) -> Manifest:
    datasets = _library("datasets", path, "a data set of Hugging Face")
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        if (split or "train") not in found:
            raise UserError(f"{name}: its splits are {', '.join(found)}; name one of them as {path}@SPLIT")
        found = found[split or "train"]
    elif split:
        raise UserError(f"{name}: it has no splits; name it as {path}")
    sounds = [column for column, feature in found.features.items() if _is_sound(datasets, feature)]
    if not has_fields([*found.column_names, *("audio" for _ in sounds)]) or "ref_audio" in sounds:
        raise UserError(
            f"{name}: its columns are {', '.join(found.column_names)}; expected audio and text, and ref_audio as paths"
        )
    plain = found.select_columns([column for column in found.column_names if column in KNOWN and column not in sounds])
    if not sounds:
        return Listed(name, path, _rows(plain))
    sound = found.select_columns(sounds[:1])
    if isinstance(found.features[sounds[0]], datasets.Audio):
        sound = sound.cast_column(sounds[0], datasets.Audio(decode=False))

    def read(index: int) -> tuple[bytes, None]:
        stored = sound[index][sounds[0]]
        if stored["bytes"] is not None:
            return stored["bytes"], None
        try:
            return pathlib.Path(stored["path"]).read_bytes(), None
        except OSError as error:
            raise audio.BadRecording("missing", f"{name}#{index}: {error}") from None

    place = f"{path.resolve()}/{found.split or ''}"
    stored = lambda index: audio.Stored(f"{name}#{index}", partial(read, index), f"{place}#{index}")  # noqa: E731
    return Listed(name, path, ((key, row | {"audio": int(key)}) for key, row in _rows(plain)), stored)


def _is_sound(datasets, feature) -> bool:
    """Whether a column holds the content of audio files."""
    is_struct = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    return isinstance(feature, datasets.Audio) or (is_struct and feature["bytes"].dtype != "null")


def _rows(dataset) -> _Entries:
    labels = {column: feature for column, feature in dataset.features.items() if hasattr(feature, "int2str")}
    for number, row in enumerate(dataset):
        named = {
            column: labels[column].int2str(row[column]) for column in labels if row[column] is not None and row[column] >= 0
        }
        yield str(number), row | named


def _library(module: str, path: pathlib.Path, what: str):
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{path}: {what}; to read it, install the package {module} (extra {module!r})") from None
