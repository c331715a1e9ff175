"""What a checkpoint directory holds: which steps are complete, and the JSON part of a step.

    checkpoints/STEP/params/           one Orbax item per field of the train state: params, opt_state, ema, step ..
    checkpoints/STEP/meta/             JSON: step, config, versions of the libraries, what the training loop must remember
    checkpoints/STEP/checksums.json    size and CRC-32 of every file of the step (integrity.py)
    checkpoints/STEP.damaged/          a damaged step that a resuming run has renamed (manager.py)

STEP is the number of finished updates. A step gets its number, by a rename, only when all its files and the checksums are
on disk: a directory with another name is not a complete step.
"""

import functools
import importlib.metadata
import os
import pathlib
import sys

import orbax.checkpoint as ocp
from etils import epath

from voxcpm2_jax.processes import from_first

META = "meta"

_PACKAGES = ("voxcpm2_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a saved state depends on."""
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def has_steps(workdir: str | os.PathLike) -> bool:
    """Whether a run in this directory resumes, as the first process sees it. Every process must call this."""
    return bool(from_first(complete_steps(pathlib.Path(workdir).absolute() / "checkpoints")))


def complete_steps(directory: pathlib.Path) -> list[int]:
    """The complete steps of a checkpoints/ directory; empty if there is no such directory."""
    if not directory.is_dir():
        return []
    return [int(p.name) for p in ocp.utils.checkpoint_steps_paths(directory) if p.name.isdigit()]


def is_step(path: pathlib.Path) -> bool:
    """Whether `path` is a complete step directory."""
    has_weights = (path / "params").is_dir() or (path / "ema").is_dir()  # from a bucket one of them is copied
    return has_weights and (path / META).is_dir() and ocp.utils.is_checkpoint_finalized(epath.Path(path))


def step_directory(path: str | os.PathLike) -> pathlib.Path:
    """The step directory that `path` names: the path itself, or the latest step of a workdir, which must have one."""
    path = pathlib.Path(path).absolute()
    return path if is_step(path) else path / "checkpoints" / str(max(complete_steps(path / "checkpoints")))


def weights_item(path: str | os.PathLike) -> pathlib.Path:
    """The directory of the weights to use: the averaged ones if the step has them."""
    step = step_directory(path)
    return step / ("ema" if (step / "ema").is_dir() else "params")


def read_meta(path: str | os.PathLike) -> dict:
    """The JSON part of one step directory."""
    return ocp.JsonCheckpointHandler().restore(epath.Path(pathlib.Path(path) / META), args=ocp.args.JsonRestore())
