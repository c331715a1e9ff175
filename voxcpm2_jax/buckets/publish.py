"""Publishing: what a command writes goes to the local disk, and to a bucket when the command is done.

A directory in a bucket has a record of its upload, RECORD (stage.py). It is written first, as incomplete, which also finds out
whether anything may be written there before the work starts; then come the files; the record of all files, now complete, is the
last. Readers refuse a directory whose record is incomplete. A single file needs no record: an object appears whole.
"""

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Iterator

from voxcpm2_jax.buckets import cache, store
from voxcpm2_jax.buckets.stage import RECORD, checksum
from voxcpm2_jax.config.plain import UserError


@contextlib.contextmanager
def directory(path: str, *, fresh: bool = False, resumes: bool = False) -> Iterator[str]:
    """Yields the local path of a directory to write: `path`, or where that is a URL, one that is uploaded afterwards.

    Args:
        fresh: what `path` names must be absent or empty; for a local path that is left to the command.
        resumes: the command continues what it finds; after a failure the local files stay.
    Raises:
        UserError: nothing can be written there, or `fresh` and something is there.
    """
    if not store.is_url(path):
        yield path
        return
    found = store.objects(path)
    if fresh and _is_taken(path, found):
        raise UserError(f"{path}: already there; choose a name that no objects begin with")
    made = cache.directory("outputs", path)
    if not resumes:
        shutil.rmtree(made, ignore_errors=True)
    _record(path, complete=False)
    try:
        yield str(made)
    except BaseException:
        if not found:
            store.delete(path, [RECORD])
        if not resumes:
            shutil.rmtree(made, ignore_errors=True)
        raise
    paths = {p.relative_to(made).as_posix(): p for p in sorted(made.rglob("*")) if p.is_file()}
    paths = {name: p for name, p in paths.items() if not re.search(r"(^|/)\.[^/]*[0-9a-f]{32}", name)}  # left by a killed one
    sums = {name: checksum(p) for name, p in paths.items()}
    num_bytes = sum(size for size, _ in sums.values())
    print(f"uploading to {path}: {len(sums)} files, {num_bytes / 1e6:,.1f} MB", file=sys.stderr, flush=True)
    store.upload(path, paths)
    _record(path, complete=True, files=sums)
    shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def file(path: str) -> Iterator[str]:
    """The same for one file; if the block writes none, none is uploaded."""
    if not store.is_url(path):
        yield path
        return
    store.objects(path)  # no such bucket, no answer: found out before the work starts
    made = cache.directory("outputs", path)
    made.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield str(made)
        if made.is_file():
            parent, _, name = path.rpartition("/")
            store.upload(parent, {name: made})
    finally:
        made.unlink(missing_ok=True)


def _is_taken(url: str, found: dict) -> bool:
    """Whether anything but the rest of an upload that did not end is there."""
    if RECORD not in found:
        return bool(found)
    return bool(json.loads(store.read(store.join(url, RECORD))).get("complete"))


def _record(url: str, *, complete: bool, files: dict | None = None) -> None:
    content = {"complete": complete, "files": files or {}}
    store.write(store.join(url, RECORD), json.dumps(content, indent=0).encode())
