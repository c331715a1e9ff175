"""Checkpoints in buckets: which objects of a workdir there a command needs, copied to the local disk.

A step in a bucket is complete when its checksums.json is there, which is uploaded last (mirror.py) and deleted first.
"""

import re
from collections.abc import Callable, Iterable

from voxcpm2_jax.buckets import store
from voxcpm2_jax.buckets.stage import stage
from voxcpm2_jax.checkpoint.integrity import CHECKSUMS_FILE
from voxcpm2_jax.checkpoint.steps import META
from voxcpm2_jax.config.plain import UserError

_IN_STEP = re.compile(r"checkpoints/(\d+)/(.+)")
_UNREAD = ("checkpoints", "tensorboard", "profile", "compiled")  # of a workdir, not read back, except:
_PROGRAM = "compiled/train_step-"  # train/ahead.py; JAX reads its own programs from the bucket


def local_checkpoint(path, *, whole: bool = False):
    """A CKPT argument as a local path. Of a workdir in a bucket this is its newest step, of which the weights are copied.

    Args:
        whole: copy the state of the optimiser too.
    Raises:
        UserError: there is no complete checkpoint, or no access to the bucket.
    """
    if not store.is_url(path):
        return path
    names = store.objects(path)
    of_step = re.fullmatch(r"(.+)/checkpoints/(\d+)/?", path)
    if not of_step and not any(name.startswith("checkpoints/") for name in names):
        return str(stage(path))  # a released directory, or none, which the command says
    workdir = of_step[1] if of_step else path
    steps = [int(of_step[2])] * (CHECKSUMS_FILE in names) if of_step else complete_steps(names)
    if not steps:
        raise UserError(f"{path}: no complete checkpoint; expected a step with {CHECKSUMS_FILE}, which is uploaded last")
    step = max(steps)
    prefix = "" if of_step else f"checkpoints/{step}/"
    item = "ema" if any(name.startswith(f"{prefix}ema/") for name in names) else "params"
    is_wanted = wanted({step: None if whole else (META, item)})
    copied = stage(workdir, lambda name: is_wanted(name) and not name.startswith(_PROGRAM))
    return str(copied / "checkpoints" / str(step))


def local_workdir(path):
    """A workdir as a local path, to list its checkpoints: of each, only the meta is copied from a bucket."""
    if not store.is_url(path):
        return path
    return str(stage(path, wanted(dict.fromkeys(complete_steps(store.objects(path)), (META,)))))


def complete_steps(names: Iterable[str]) -> list[int]:
    """The complete steps among the objects of a workdir."""
    matches = (_IN_STEP.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in matches if match and match[2] == CHECKSUMS_FILE)


def step_of(name: str) -> int | None:
    """The step that an object of a workdir belongs to, complete or not."""
    match = _IN_STEP.fullmatch(name)
    return int(match[1]) if match else None


def is_kept_beside(name: str) -> bool:
    """Whether an object of a workdir belongs to no checkpoint and is read again when a run continues."""
    return name.split("/")[0] not in _UNREAD or name.startswith(_PROGRAM)


def wanted(items: dict[int, tuple[str, ...] | None]) -> Callable[[str], bool]:
    """Chooses objects of a workdir: those beside the checkpoints, and of each step the named items (None: all)."""

    def is_wanted(name: str) -> bool:
        match = _IN_STEP.fullmatch(name)
        if not match or int(match[1]) not in items:
            return is_kept_beside(name)
        parts = items[int(match[1])]
        item, is_below, _ = match[2].partition("/")
        return parts is None or not is_below or item in parts

    return is_wanted
