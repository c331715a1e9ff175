"""Objects of buckets, named by URL (gs://BUCKET/NAME, s3://BUCKET/NAME): list, read, write, delete.

gcsfs and s3fs do the work, each with the credentials that it finds by itself: gcloud's, the AWS tools', or those of the
machine's account. Nothing here reads credentials, and no text of these libraries is shown, since it may quote a request.

A request that fails is repeated by the libraries for about half a minute. Transfers of files are then tried again after the
pauses of PAUSES_SEC, except where access is denied or something does not exist.
"""

import contextlib
import errno
import functools
import importlib.util
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

from voxcpm2_jax.config.plain import UserError

T = TypeVar("T")

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}  # and the package that each needs
PAUSES_SEC = (5, 20, 60)

_DENIED = (401, 403)
_MOST_FILES = 16  # transferred at the same time
_SENT_AT_ONCE = 5 << 20  # bytes: gcsfs sends larger files in parts


class BucketError(UserError):
    """A bucket did not do what was asked of it; the message is the line to show."""


class Missing(BucketError):  # noqa: N818
    """No such bucket or object."""


class Unreachable(BucketError):  # noqa: N818
    """The bucket does not answer, or not in a way that says what is wrong."""


class Object(NamedTuple):
    size: int  # bytes
    version: str  # differs after the object was written again
    md5: str  # base64; "" if the store does not tell


def is_url(path) -> bool:
    """Whether `path` names something in a bucket."""
    return str(path).partition("://")[0] in SCHEMES and "://" in str(path)


def join(url: str, name: str) -> str:
    """The URL of the object `name` below `url`; of `url` itself for ""."""
    return f"{url.rstrip('/')}/{name}" if name else url


def objects(url: str) -> dict[str, Object]:
    """The objects below a URL by their relative names, or, where the URL names one object, that one under the name "".

    Raises:
        BucketError: no such bucket, no access to it, or no answer.
    """
    system, path = _system(url)
    for pause_sec in (0.2, 1.0, None):
        try:
            found = _ask(url, lambda: system.find(path, detail=True, refresh=True))
            break
        except Missing:  # no such bucket; or another process has just deleted the only object below the URL
            if pause_sec is None:
                raise
            time.sleep(pause_sec)
    below, names = path.rstrip("/") + "/", {}
    for full, info in found.items():
        name = full.removeprefix(below) if full.startswith(below) else "" if full == path else None
        if name is None or (name.endswith("/") and not info["size"]):  # what consoles write to show a folder
            continue
        if any(part in ("", ".", "..") for part in name.split("/")) and name:
            raise BucketError(f"{join(url, name)}: a name that no file can have; rename the object")
        version = str(info.get("generation") or info.get("ETag") or info.get("etag") or info.get("LastModified"))
        names[name] = Object(int(info["size"]), version, info.get("md5Hash") or "")
    return {"": names[""]} if "" in names else names


def read(url: str) -> bytes:
    system, path = _system(url)
    return _patiently(url, lambda: system.cat_file(path))


def write(url: str, content: bytes) -> None:
    """Writes one object, which appears whole or not at all."""
    system, path = _system(url)
    in_parts = {"chunksize": len(content)} if _is_cut(url, content) else {}
    _patiently(url, lambda: system.pipe_file(path, content, **in_parts))


def download(url: str, files: Mapping[str, pathlib.Path]) -> None:
    """Writes objects below `url` to files, whose directories must exist; a download that is cut off leaves part of a file."""
    system, path = _system(url)
    names = [join(path, name) for name in files]
    if names:
        _patiently(url, lambda: system.get(names, [str(file) for file in files.values()], batch_size=_MOST_FILES))


def upload(url: str, files: Mapping[str, pathlib.Path]) -> None:
    """Writes files to objects below `url`, in any order. Each appears whole or not at all."""
    system, path = _system(url)
    alone = {}
    for name, file in files.items():
        content = _ask(url, lambda file=file: file.read_bytes() if file.stat().st_size < _SENT_AT_ONCE else b"")
        if _is_cut(url, content):
            alone[name] = content
    names = [name for name in files if name not in alone]
    if names:
        sources, targets = [str(files[name]) for name in names], [join(path, name) for name in names]
        _patiently(url, lambda: system.put(sources, targets, batch_size=_MOST_FILES))
    for name, content in alone.items():
        write(join(url, name), content)


def delete(url: str, names: Iterable[str]) -> None:
    """Deletes objects below `url`, in this order; those that do not exist are no error."""
    system, path = _system(url)
    for name in names:
        with contextlib.suppress(Missing):
            _patiently(url, lambda name=name: system.rm_file(join(path, name)))


# ---- the libraries ---------------------------------------------------------------------------------------------------


def _system(url: str):
    """The fsspec file system of a URL, and the path in it."""
    scheme, _, path = url.partition("://")
    if not path.strip("/"):
        raise UserError(f"{url}: names no bucket; expected {scheme}://BUCKET/NAME")
    if importlib.util.find_spec(SCHEMES[scheme]) is None:
        raise UserError(
            f"{url}: buckets need {SCHEMES[scheme]}, which is not installed: pip install 'voxcpm2-jax[bucket]'; or mount the "
            "bucket and name the mount point"
        )
    return _open(scheme, os.getpid()), path


@functools.cache
def _open(scheme: str, process: int):
    """`process`: a forked process must not use its parent's connections."""
    import fsspec

    logging.getLogger(SCHEMES[scheme]).setLevel(logging.CRITICAL)  # it logs tracebacks of requests that are repeated
    # Listings are not kept: they change under us.
    if scheme == "s3":
        patience = {"connect_timeout": 5, "retries": {"max_attempts": 2}}
        return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True, config_kwargs=patience)
    return fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True, consistency="size")


def _is_cut(url: str, content: bytes) -> bool:
    """Whether gcsfs 2026.10 would lose the end of a small object. It sends one as a part of a message whose parts are divided
    by a line feed and "--==0==": a carriage return before that counts as part of the line's end. In parts nothing is lost."""
    return url.startswith("gs:") and (content.endswith(b"\r") or b"\n--==0==" in content)


def _ask(url: str, request: Callable[[], T]) -> T:
    """What the request returns, or one line that says what is wrong."""
    try:
        return request()
    except Exception as error:  # fsspec, aiohttp, botocore and google-auth each have errors of their own
        if _is_local(error):
            raise UserError(f"{url}: its local file cannot be read or written ({error})") from None
        if isinstance(error, FileNotFoundError):
            raise Missing(f"{url}: no such bucket or object") from None
        login = "gcloud auth application-default login" if url.startswith("gs") else "aws configure"
        if _is_denied(error):
            raise BucketError(
                f"{url}: access denied; log in ({login}) or give this machine's account the right to read and write there"
            ) from None
        raise Unreachable(
            f"{url}: the bucket does not answer ({type(error).__name__}); check the network, the name and the login ({login})"
        ) from None


def _patiently(url: str, request: Callable[[], T]) -> T:
    for pause in (*PAUSES_SEC, None):
        try:
            return _ask(url, request)
        except Unreachable as error:
            if pause is None:
                raise
            print(f"{error}; next attempt in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    raise AssertionError


def _is_denied(error: BaseException) -> bool:
    """Whether the store refused, or no credentials were found."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return (
        isinstance(error, PermissionError)
        or status in _DENIED
        or getattr(error, "code", None) in _DENIED
        or str(error).startswith("Forbidden")  # gcsfs
        or any(word in type(error).__name__ for word in ("Credentials", "RefreshError", "TokenRetrieval"))
    )


def _is_local(error: Exception) -> bool:
    """Whether the error is about a file of this machine: a full disk, say."""
    if not isinstance(error, OSError):
        return False
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or os.path.isabs(str(error.filename))
