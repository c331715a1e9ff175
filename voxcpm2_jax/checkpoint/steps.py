"""TODO checkpoint.steps."""

import functools
import importlib.metadata
import pathlib
import sys

import orbax.checkpoint as ocp
from etils import epath

from voxcpm2_jax.processes import from_first

META = "meta"

_PACKAGES = ("voxcpm2_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that a state depends on."""
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def has_steps(workdir) -> bool:
    """Whether a run in this directory goes on instead of starting, as the first process sees it. Every process asks."""
    return bool(from_first(complete_steps(pathlib.Path(workdir).absolute() / "checkpoints")))


def step_directory(path) -> pathlib.Path:
    """The step that a workdir (its latest) or a step directory means."""
    path = pathlib.Path(path).absolute()
    return path if is_step(path) else path / "checkpoints" / str(max(complete_steps(path / "checkpoints")))


def weights_item(path) -> pathlib.Path:
    """The item that holds the weights to use."""
    step = step_directory(path)
    return step / ("ema" if (step / "ema").is_dir() else "params")


def read_meta(path) -> dict:
    """The JSON part of one step directory."""
    return ocp.JsonCheckpointHandler().restore(epath.Path(pathlib.Path(path) / META), args=ocp.args.JsonRestore())


def complete_steps(directory) -> list[int]:
    """Steps under `directory` that are whole on disk."""
    if not directory.is_dir():
        return []
    return [int(p.name) for p in ocp.utils.checkpoint_steps_paths(directory) if p.name.isdigit()]


def is_step(path) -> bool:
    return (path / "params").is_dir() and (path / META).is_dir() and ocp.utils.is_checkpoint_finalized(epath.Path(path))
