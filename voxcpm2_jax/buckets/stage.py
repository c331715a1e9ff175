"""Staging: copying what a command reads from a bucket to the local disk, before it starts.

    local(path)           the path itself, or of a URL the path of its copy; several names separated by commas are each copied
    stage(url, wanted)    the same for one URL, and for some of its objects alone

An object is copied once and again only when it has changed. Each copy is compared with the size of the object and with the
MD5 that Google's store keeps; what one of our commands uploaded, also with the CRC-32 in its record (publish.py). Shards and
checkpoints have checksums of their own besides, which are compared when they are read.
"""

import base64
import hashlib
import json
import pathlib
import sys
import uuid
import zlib
from collections.abc import Callable

from voxcpm2_jax.buckets import cache, store
from voxcpm2_jax.config.plain import UserError
from voxcpm2_jax.files import replace_file

RECORD = "upload.json"  # of a directory that a command uploaded: {"complete": bool, "files": {name: [bytes, CRC-32]}}

_CHUNK = 1 << 22


def local(path: str | None) -> str | None:
    """`path` with every URL in it replaced by the path of a copy; None stays None."""
    if path is None or "://" not in str(path):
        return path
    return ",".join(str(stage(name)) if store.is_url(name) else name for name in str(path).split(","))


def stage(url: str, wanted: Callable[[str], bool] = lambda name: True) -> pathlib.Path:
    """Copies the objects below a URL whose names are wanted, or one object -> the path of the copy.

    Raises:
        UserError: nothing is there, it was uploaded in part only, or there is no room for it.
    """
    with cache.alone(url) as notes_file:
        found = store.objects(url)
        if not found:
            raise UserError(f"{url}: nothing there; expected an object, or a name that objects begin with")
        record = check_complete(url, found)
        target = cache.directory("staged", url)
        notes = json.loads(notes_file.read_text(encoding="utf-8")) if notes_file.exists() else {}
        if target.is_dir():
            for path in target.rglob("*"):
                if not path.is_dir() and path.relative_to(target).as_posix() not in found:
                    path.unlink()  # deleted in the bucket since
        paths = {name: target / name if name else target for name in found if wanted(name)}
        new = {name: found[name] for name, path in paths.items() if not _is_copy(found[name], path, notes.get(str(path)))}
        size = sum(x.size for x in new.values())
        if new:
            cache.make_room(url, size)
            print(f"copying {url}: {len(new)} files, {size / 1e6:,.1f} MB", file=sys.stderr, flush=True)
            fetch(url, target, new, record)
            notes |= {str(paths[name]): _note(x, paths[name]) for name, x in new.items()}
            replace_file(notes_file, json.dumps(notes))
        return target


def fetch(url: str, target: pathlib.Path, found: dict[str, store.Object], record: dict | None = None) -> None:
    """Copies objects to files below `target`, or one object to `target` itself. Each file appears when it is whole.

    Args:
        found: what to copy, from `store.objects`.   record: sizes and CRC-32 that are expected, as in RECORD.
    Raises:
        UserError: a copy differs from what the bucket should hold.
    """
    aside = {}
    try:
        for name in found:
            path = target / name if name else target
            path.parent.mkdir(parents=True, exist_ok=True)
            aside[name] = path.with_name(f".{uuid.uuid4().hex}.part")
        store.download(url, aside)
        for name, part in aside.items():
            _compare(store.join(url, name), part, found[name], (record or {}).get(name))
        for name, part in aside.items():
            part.replace(target / name if name else target)
    finally:
        for part in aside.values():
            part.unlink(missing_ok=True)


def check_complete(url: str, found: dict) -> dict | None:
    """The record of an upload, by name, None if none was kept; raises UserError if the upload did not end."""
    if RECORD not in found:
        return None
    try:
        record = json.loads(store.read(store.join(url, RECORD)))
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in record["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{store.join(url, RECORD)}: not the record of an upload ({type(error).__name__})") from None
    if not record.get("complete"):
        raise UserError(f"{url}: its upload has not ended; wait, or start the command that writes it again")
    if missing := sorted(files.keys() - found.keys()):
        raise UserError(f"{url}: {len(missing)} of its files are missing, such as {missing[0]}; upload it again")
    return files


def checksum(path: pathlib.Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    crc, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return size, crc


def _compare(url: str, copy: pathlib.Path, expected: store.Object, recorded: tuple[int, int] | None) -> None:
    size = copy.stat().st_size
    is_same = size == expected.size
    if is_same and recorded:
        is_same = checksum(copy) == tuple(recorded)
    elif is_same and expected.md5:
        with copy.open("rb") as file:
            is_same = hashlib.file_digest(file, "md5").digest() == base64.b64decode(expected.md5)
    if not is_same:
        raise UserError(
            f"{url}: the copy of {size} bytes differs from what was written there ({expected.size} bytes); it changed just "
            "now, or is damaged: try again, then upload it again"
        )


def _is_copy(found: store.Object, path: pathlib.Path, note: list | None) -> bool:
    """Whether a file is the copy of an object that was noted, and neither has changed since."""
    return path.is_file() and note == _note(found, path)


def _note(found: store.Object, path: pathlib.Path) -> list:
    stat = path.stat()
    return [found.size, found.version, stat.st_size, stat.st_mtime_ns]
