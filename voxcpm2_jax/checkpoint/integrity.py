"""Checksums: written with every step, compared before a step is used.

A resuming run compares all files of a step (each process its share) before it starts from it; other readers compare the
parts that they use. CRC-32 takes 0.25 s per gigabyte and core (SHA-256: 0.55 s), and protects against accidents only.
Steps saved by versions that wrote no checksums are read without a check, and the run reports it.
"""

import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from voxcpm2_jax.checkpoint.steps import META, complete_steps, step_directory
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.files import replace_file

CHECKSUMS_FILE = "checksums.json"

# Orbax writes the last two, with times in them, after the checksums. They hold nothing of the state.
_UNCOUNTED = (CHECKSUMS_FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 1 << 22  # bytes per read
_READERS = 4  # files read in parallel


def write_checksums(path: pathlib.Path) -> None:
    """Writes checksums.json into a step directory whose files are complete."""
    files = _files(path)
    with ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(_crc32, (path / name for name in files))
        content = {name: [size, crc] for (name, size), crc in zip(files.items(), sums)}
    replace_file(path / CHECKSUMS_FILE, json.dumps({"files": content, "hash": "crc32"}, indent=0), sync=True)


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
        sums = pool.map(_crc32, (path / name for name in mine))
        problems += [f"{name} was altered (CRC-32)" for name, crc in zip(mine, sums) if crc != recorded[name][1]]
    return "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def _files(path: pathlib.Path) -> dict[str, int]:
    """Size of each file of a step directory that has a checksum, by relative path."""
    found = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if not p.is_dir()}
    return {name: p.lstat().st_size for name, p in found.items() if name not in _UNCOUNTED}


def _crc32(path: pathlib.Path) -> int:
    """-1, which is no CRC-32, for a file that cannot be read."""
    crc = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
    except OSError:
        return -1
    return crc
