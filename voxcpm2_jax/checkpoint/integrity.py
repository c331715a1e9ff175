"""Checksums: written with every step, compared before a step is used.

While a step is saved each process sums the files that it wrote itself, which are still in its page cache. The first process
then sums the small files that remain and writes all sums into one file.

A resuming run compares all files of a step (each process its share) before it starts from it; other readers compare the
parts that they use. CRC-32 takes 0.25 s per gigabyte and core (SHA-256: 0.55 s), and protects against accidents only.
Steps saved by versions that wrote no checksums are read without a check, and the run reports it.
"""

import json
import os
import pathlib
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from voxcpm2_jax.checkpoint.steps import META, complete_steps, step_directory
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.files import flush, replace_file

CHECKSUMS_FILE = "checksums.json"

# Orbax writes the last two, with times in them, after the checksums. They hold nothing of the state.
_UNCOUNTED = (CHECKSUMS_FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 1 << 22  # bytes per read
_READERS = 4  # files read in parallel


class SummedPyTree(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of one item, which also lets each process sum the files that it wrote (`own_sums`)."""

    async def async_save(self, directory, *args, **kwargs):
        return [_SumAfter(await super().async_save(directory, *args, **kwargs), pathlib.Path(directory))]


class _SumAfter:
    """A future of Orbax: its result is there when the files of an item are written and summed."""

    def __init__(self, written: Sequence, item: pathlib.Path):
        self._written, self._item = written, item

    def result(self, timeout: float | None = None) -> None:
        begin = time.monotonic()
        for future in self._written:
            future.result(None if timeout is None else max(timeout - (time.monotonic() - begin), 0.0))
        process = jax.process_index()
        files = {}
        for own in (self._item / f"ocdbt.process_{process}", self._item / "array_metadatas" / f"process_{process}"):
            files |= _files(own, self._item) if own.exists() else {}  # a process may have nothing to write
        begin = time.monotonic()
        content = {"files": _flush_and_sum(self._item, files), "sec": time.monotonic() - begin}
        own_sums(self._item, process).write_text(json.dumps(content), encoding="utf-8")

    def cancel(self) -> None:
        for future in self._written:
            future.cancel()


def own_sums(item: pathlib.Path, process: int) -> pathlib.Path:
    """The file that holds the sums of one process until `write_checksums` has read it."""
    return item / f".checksums.process_{process}.json"


class Sealed(NamedTuple):
    num_bytes: int  # of all files of a step
    sum_sec: float  # of the process that summed longest


def write_checksums(path: pathlib.Path, parts: Sequence[pathlib.Path] = ()) -> Sealed:
    """Writes checksums.json into a step directory whose files are complete, and flushes all of it to disk.

    Args:
        parts: files of `own_sums`, each of which must be there; they are removed. What they do not list is summed here.
    """
    content, sec = {}, {}  # seconds by process
    for part in parts:
        read = json.loads(part.read_text(encoding="utf-8"))
        content |= {f"{part.parent.name}/{name}": of_file for name, of_file in read["files"].items()}
        sec[part.name] = sec.get(part.name, 0.0) + read["sec"]
        part.unlink()
    begin = time.monotonic()
    # The list of files is not compared with `content`: a network file system may not show the files of other hosts here yet.
    content |= _flush_and_sum(path, {name: size for name, size in _files(path).items() if name not in content})
    replace_file(path / CHECKSUMS_FILE, json.dumps({"files": content, "hash": "crc32"}, indent=0), sync=True)
    sum_sec = max(sec.values(), default=0.0) + time.monotonic() - begin
    return Sealed(sum(size for size, _ in content.values()), sum_sec)


def _flush_and_sum(path: pathlib.Path, files: Mapping[str, int]) -> dict[str, list[int]]:
    """[size, CRC-32] by relative path; the files, and the directories that hold them, are on disk then."""
    paths = [path / name for name in files]
    directories = {parent for p in paths for parent in p.parents if parent == path or path in parent.parents}
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(flush, (*paths, *directories)))
        return {name: [size, crc] for (name, size), crc in zip(files.items(), pool.map(_crc32, paths))}


def verify(path: str | os.PathLike, *parts: str) -> None:
    """Compares the files of a step, or of a workdir's latest step, with its checksums.

    Args:
        parts: items to compare, such as "params"; without any, the whole step.
    Raises:
        UserError: a file is missing, truncated, altered or unexpected, or this is no checkpoint.
    """
    step = step_directory(path)
    problem = find_damage(step, parts)
    if problem:
        raise damaged(step, problem)


def damaged(step: pathlib.Path, problem: str) -> UserError:
    """The error for a damaged step; it lists the other steps of the run."""
    steps = complete_steps(step.parent)
    others = sorted(set(steps) - {int(step.name)} if step.name.isdigit() else steps)
    instead = f"use another step: {', '.join(map(str, others))}" if others else "the run has no other step"
    return UserError(f"{step}: damaged checkpoint: {problem}; {instead}")


def find_damage(path: pathlib.Path, parts: Sequence[str] = (), share: tuple[int, int] = (0, 1)) -> str:
    """Describes what is wrong with the files of a step; "" if nothing is.

    Args:
        parts: as in `verify`.
        share: (i, n): read only the i-th of n shares of the files. Names and sizes are compared for all files.
    """
    if not (path / CHECKSUMS_FILE).is_file():
        if not (path / META / "metadata").is_file():
            return f"it has neither {CHECKSUMS_FILE} nor {META}/, so it is no checkpoint of a training run"
        try:
            is_older = "versions" not in json.loads((path / META / "metadata").read_text(encoding="utf-8"))
        except ValueError as error:
            return f"{META}/metadata is not JSON ({error})"
        return "" if is_older else f"{CHECKSUMS_FILE} is missing"
    try:
        recorded = json.loads((path / CHECKSUMS_FILE).read_text(encoding="utf-8"))["files"]
        recorded = {str(name): (int(size), int(crc)) for name, (size, crc) in recorded.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS_FILE} cannot be read ({error!r:.80})"
    found = _files(path)
    if parts:
        recorded, found = ({n: x for n, x in files.items() if n.split("/")[0] in parts} for files in (recorded, found))
    problems = [f"{name} is missing" for name in recorded.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in found.keys() - recorded.keys()]
    common = sorted(recorded.keys() & found.keys(), key=lambda name: (-recorded[name][0], name))
    problems += [f"{n} has {found[n]} bytes, expected {recorded[n][0]}" for n in common if found[n] != recorded[n][0]]
    # Sorted by size, so that every share gets as many large files as the others.
    mine = [name for name in common[share[0] :: share[1]] if found[name] == recorded[name][0]]
    with ThreadPoolExecutor(_READERS) as pool:
        found_crcs = pool.map(_crc32_or_error, (path / name for name in mine))
        for name, crc in zip(mine, found_crcs):
            if isinstance(crc, OSError):
                problems.append(f"{name} cannot be read ({crc.strerror})")
            elif crc != recorded[name][1]:
                problems.append(f"{name} was altered (CRC-32)")
    return "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def _files(path: pathlib.Path, base: pathlib.Path | None = None) -> dict[str, int]:
    """Size of each file at or below `path` that has a checksum, by its path relative to `base`, by default `path`."""
    found = {p.relative_to(base or path).as_posix(): p for p in sorted((path, *path.rglob("*"))) if not p.is_dir()}
    return {name: p.lstat().st_size for name, p in found.items() if name not in _UNCOUNTED}


def _crc32(path: pathlib.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc32_or_error(path: pathlib.Path) -> int | OSError:
    try:
        return _crc32(path)
    except OSError as error:
        return error
