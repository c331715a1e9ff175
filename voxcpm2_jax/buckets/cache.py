"""Local copies of what lies in buckets: where they are, and how large they may grow.

    CACHE/staged/gs/BUCKET/NAME       copies of objects, under their own names (stage.py)
    CACHE/outputs/gs/BUCKET/NAME      what a command writes, until it is uploaded (publish.py)
    CACHE/workdirs/gs/BUCKET/NAME/0   what process 0 of a training run writes, uploaded as it grows (mirror.py)

CACHE is $VOXCPM2_JAX_CACHE, or voxcpm2_jax in the user's cache directory. $VOXCPM2_JAX_CACHE_GB limits the copies in
CACHE/staged; in any case 1 GB of the disk stays free.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator

from voxcpm2_jax.config.plain import UserError

_LEFT_FREE = 1 << 30  # bytes


def directory(kind: str, url: str) -> pathlib.Path:
    """The local path for a URL; `kind` is a first level of the tree above."""
    scheme, _, path = url.rstrip("/").partition("://")
    if ".." in path.split("/"):
        raise UserError(f"{url}: expected a name without '..'")
    return root() / kind / scheme / path


def root() -> pathlib.Path:
    """CACHE."""
    if own := os.environ.get("VOXCPM2_JAX_CACHE"):
        return pathlib.Path(own).absolute()
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "voxcpm2_jax"


def make_room(url: str, size: int) -> None:
    """Raises UserError unless `size` more bytes may be staged for `url`."""
    staged = root() / "staged"
    staged.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(staged).free - _LEFT_FREE
    used = sum(path.lstat().st_size for path in staged.rglob("*") if path.is_file())
    if size > min(free, limit_bytes() - used):
        raise UserError(
            f"{url}: {size / 1e9:.3g} GB have to be copied to {staged}, where {max(free, 0) / 1e9:.3g} GB are free and "
            f"{used / 1e9:.3g} GB of at most {limit_bytes() / 1e9:.3g} GB are used: delete what is not needed there, set "
            "VOXCPM2_JAX_CACHE to a larger disk or VOXCPM2_JAX_CACHE_GB to a higher limit, or mount the bucket and name the "
            "mount point"
        )


def limit_bytes() -> float:
    """The most that copies of objects may take; infinite without a limit."""
    text = os.environ.get("VOXCPM2_JAX_CACHE_GB", "inf")
    try:
        limit = float(text)
        if limit <= 0:
            raise ValueError
    except ValueError:
        raise UserError(f"VOXCPM2_JAX_CACHE_GB={text}: expected a number of gigabytes over 0") from None
    return limit * 1e9


@contextlib.contextmanager
def alone(url: str) -> Iterator[pathlib.Path]:
    """Waits until no other process of this machine copies from the same bucket -> a file for notes about these copies."""
    scheme, _, path = url.partition("://")
    notes = root() / "notes" / f"{scheme}.{path.split('/')[0]}.json"
    try:
        notes.parent.mkdir(parents=True, exist_ok=True)
        with notes.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield notes
    except OSError as error:
        raise UserError(f"{root()}: cannot be written ({error}); set VOXCPM2_JAX_CACHE to a local directory") from None
