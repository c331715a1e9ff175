"""Writing files and directories so that a reader, or a run that starts again, never sees half of one.

Everything is written under a hidden temporary name in the same directory and renamed when it is complete. The temporary
names are random: hosts that share a disk also share process ids, so a process id would not be unique.

    flush(path)               flushes a file, or the entries of a directory, to disk
    aside(path)               context manager: write to the path it yields; renamed onto `path` when the block ends
    replace_file, write_json, save_array                one file in one call
    fresh_directory(path)     context manager: the same for a directory that must not exist yet
    once(path, write)         the same for a file or directory that several hosts may make at the same time
    heal(path, last_step)     cuts a torn metrics.jsonl back to whole lines
    check_file, check_directory                         refuse a path that cannot be written, before the work starts
"""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from voxcpm2_jax.config.plain import UserError

# ---- files -----------------------------------------------------------------------------------------------------------


def flush(path: str | os.PathLike) -> None:
    """Flushes a file, or the entries of a directory, to disk (fsync).

    A file that was made or renamed survives a power cut only if its directory was flushed too. Some file systems have no
    fsync of directories and answer "invalid argument": they promise nothing more, so this does not fail there.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(file).st_mode):
            raise
    finally:
        os.close(file)


@contextlib.contextmanager
def aside(path: str | os.PathLike, *, name: str | None = None, sync: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`, renamed onto `path` when the block ends and removed if the block fails.

    The temporary name keeps the suffix, because some libraries choose the format by it. If the block writes nothing,
    `path` stays as it is.

    Args:
        name: the temporary name, if others read the file while it is written; default: hidden and unique.
        sync: flush the file to disk before the rename, and its directory afterwards.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(name or f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        if temporary.exists():
            if sync:
                flush(temporary)
            temporary.replace(path)
            if sync:
                flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace_file(path: str | os.PathLike, text: str, *, sync: bool = False) -> None:
    """Writes text in UTF-8; `sync` as in `aside`."""
    with aside(path, sync=sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    replace_file(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes an .npy file."""
    with aside(path) as temporary:
        np.save(temporary, array)


# ---- directories -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fresh_directory(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a new directory that is renamed to `directory` when the block ends and removed if the block fails.

    Raises:
        UserError: `directory` is not empty, or cannot be made.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: already there; choose a directory that is absent or empty")
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.incomplete")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None
    try:
        yield temporary
        try:
            temporary.replace(directory)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def once(path: str | os.PathLike, write: Callable[[pathlib.Path], None]) -> None:
    """Makes a file or directory unless it exists; several hosts may call this at the same time, and the first one wins.

    Args:
        write: called with a temporary directory; makes an entry named `path.name` in it, which is moved to `path`.
    Raises:
        UserError: `path` cannot be written.
    """
    path = pathlib.Path(path)
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error})") from None
    try:
        write(temporary)
        with contextlib.suppress(OSError):  # another host was first
            (temporary / path.name).rename(path)
        if not path.exists():
            raise UserError(f"{path}: cannot be written")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def heal(path: str | os.PathLike, last_step: int) -> dict | None:
    """Cuts metrics.jsonl back to whole lines of steps up to `last_step`; returns the last row, None if none is left."""
    path = pathlib.Path(path)
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # the run was killed while it wrote this line
    rows = [line for line in lines if json.loads(line)["step"] <= last_step]
    replace_file(path, "".join(rows))
    return json.loads(rows[-1]) if rows else None


# ---- checks before the work starts -----------------------------------------------------------------------------------


def check_file(path: str | os.PathLike) -> None:
    """Raises UserError unless a file can be written at `path`, in a directory that exists."""
    path = pathlib.Path(path)
    if path.is_dir() or _refusal(path.parent):
        raise UserError(f"{path}: cannot be written; its directory must exist and be writable")


def check_directory(path: str | os.PathLike) -> None:
    """Raises UserError unless `path` is a directory that can be written to, or can be made."""
    path = pathlib.Path(path).absolute()
    if reason := _refusal(next(p for p in (path, *path.parents) if p.exists())):
        raise UserError(f"{path}: cannot be written; expected a directory, or a name for a new one ({reason})")


def check_empty(path: str | os.PathLike | None) -> None:
    """Raises UserError unless `path` is None, or a directory without content that can be written to or can be made."""
    if path is None:
        return
    check_directory(path)
    if pathlib.Path(path).exists() and any(pathlib.Path(path).iterdir()):
        raise UserError(f"{path}: not empty; expected an absent or empty directory")


def _refusal(directory: pathlib.Path) -> str:
    """Why nothing can be created in `directory`; "" if something can.

    It tries, because permission bits do not tell: root ignores them, and /proc refuses in spite of them.
    """
    try:
        tempfile.TemporaryDirectory(dir=directory).cleanup()
    except OSError as error:
        return f"{error.strerror or error}: {directory}"
    return ""
