"""TODO files."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from voxcpm2_jax.config.plain import UserError


def heal(path, last_step: int) -> dict | None:
    """Cuts metrics.jsonl back to whole lines of steps up to `last_step` -> its last row; None if none is left."""
    path = pathlib.Path(path)
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # torn by whatever ended the run
    rows = [line for line in lines if json.loads(line)["step"] <= last_step]
    replace_file(path, "".join(rows))
    return json.loads(rows[-1]) if rows else None


def replace_file(path, text: str) -> None:
    """Writes aside, then renames: a reader sees the old file or the new one."""
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def fresh_directory(directory) -> Iterator[pathlib.Path]:
    """A fresh directory that becomes `directory` when the block ends, and vanishes when it fails.

    Raises:
        UserError: `directory` holds something already, or cannot be made.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: already there; choose a directory that is absent or empty")
    aside = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.incomplete")  # hosts that share a disk share pids
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None
    try:
        yield aside
        try:
            aside.replace(directory)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: pathlib.Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def save_array(path: pathlib.Path, array: np.ndarray) -> None:
    aside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.npy")
    np.save(aside, array)
    aside.replace(path)


def once(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
    """Has `write(aside)` make aside/NAME and moves it to `path`, unless that is there; another host may be first."""
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error})") from None
    try:
        write(aside)
        with contextlib.suppress(OSError):
            (aside / path.name).rename(path)
        if not path.exists():
            raise UserError(f"{path}: cannot be written")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
