"""TODO checkpoint.integrity."""

import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from voxcpm2_jax.checkpoint.steps import META, complete_steps, step_directory
from voxcpm2_jax.config.plain import UserError

CHECKSUMS_FILE = "checksums.json"

# Orbax writes these two, with times in them, after the checksums. Nothing of the state is in them.
_UNCOUNTED = (CHECKSUMS_FILE, "_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 1 << 22  # bytes read at once
_READERS = 4  # files read at once: enough for a local disk, and for a network file system to begin with


# ---- checksums -------------------------------------------------------------------------------------------------------


def write_checksums(path) -> None:
    """Writes checksums.json into a step directory whose files are all there."""
    files = _files(path)
    with ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(_crc32, (path / name for name in files))
        content = {name: [size, crc] for (name, size), crc in zip(files.items(), sums)}
    aside = path / f".{CHECKSUMS_FILE}"
    with aside.open("w", encoding="utf-8") as file:
        json.dump({"files": content, "hash": "crc32"}, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path / CHECKSUMS_FILE)


def verify(path, *parts: str) -> None:
    """Compares the files of a workdir's newest step, or of one step, with its checksums.

    Args:
        parts: items to look at, such as "params"; none: the whole step.
    Raises:
        UserError: a file is missing, truncated, altered or foreign; or there is no such checkpoint.
    """
    step = step_directory(path)
    problem = find_damage(step, parts)
    if problem:
        raise damaged(step, problem)


def damaged(step: pathlib.Path, problem: str) -> UserError:
    others = sorted(set(complete_steps(step.parent)) - {int(step.name)} if step.name.isdigit() else complete_steps(step.parent))
    instead = f"name another step of it: {', '.join(map(str, others))}" if others else "there is no other step of it"
    return UserError(f"{step}: damaged checkpoint: {problem}; {instead}")


def find_damage(path: pathlib.Path, parts: Sequence[str] = (), share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with the files of a step, in words; "" if nothing is.

    Args:
        share: (i, n): contents are read of the i-th of n parts of the files alone.
    """
    if not (path / CHECKSUMS_FILE).is_file():
        if not (path / META / "metadata").is_file():
            return f"neither {CHECKSUMS_FILE} nor {META}/ in it; not a checkpoint of ours"
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
    problems += [f"{name} is foreign" for name in found.keys() - recorded.keys()]
    common = sorted(recorded.keys() & found.keys(), key=lambda name: (-recorded[name][0], name))
    problems += [f"{n} has {found[n]} bytes, not {recorded[n][0]}" for n in common if found[n] != recorded[n][0]]
    mine = [name for name in common[share[0] :: share[1]] if found[name] == recorded[name][0]]  # large ones dealt out evenly
    with ThreadPoolExecutor(_READERS) as pool:
        sums = pool.map(_crc32, (path / name for name in mine))
        problems += [f"{name} was altered (CRC-32)" for name, crc in zip(mine, sums) if crc != recorded[name][1]]
    return "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def _files(path: pathlib.Path) -> dict[str, int]:
    """Sizes of the files under a step directory that checksums are kept of, by relative path."""
    found = {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if not p.is_dir()}
    return {name: p.lstat().st_size for name, p in found.items() if name not in _UNCOUNTED}


def _crc32(path: pathlib.Path) -> int:
    crc = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
    except OSError:
        return -1  # no checksum: a file that cannot be read is not what was written
    return crc
