"""Checkpoints: asynchronous saves, strict restores onto any mesh, and telling what a checkpoint path is.

    WORKDIR/config.json                    what the run was started with
    WORKDIR/metrics.jsonl                  one object per logged step
    WORKDIR/checkpoints/STEP/params/       one Orbax item per field of the state: params, opt_state, ema, step
    WORKDIR/checkpoints/STEP/meta/         JSON: step, config, and what the loop has to remember (data counters)

A step directory appears under its number only when every file of it is on disk; "latest" counts nothing else. Arrays
are stored by path alone ("base_lm/layers/q/kernel"), never by the classes that hold them, so a file does not depend
on how optax or a state class is built.

Orbax's CheckpointManager (its "v0" interface) is used: `orbax.checkpoint.v1` does not import in 0.12.8, and its
experimental home is bound to move.
"""

import dataclasses
import logging
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from voxcpm2_jax.config import UserError

TRAINING, RELEASED = "training", "released"  # what `kind` tells

_META = "meta"
_BARE = "value"  # path of a field that is one array
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "audiovae.safetensors", "audiovae.pth")


class Checkpoints:
    """The checkpoints of one training run.

    Args:
        workdir: made if absent.   keep: newest steps that stay.   every_steps: updates between two saves.
    """

    def __init__(self, workdir, keep: int, every_steps: int):
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self.every_steps = every_steps
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def is_due(self, step: int) -> bool:
        return step % self.every_steps == 0

    def latest_step(self) -> int | None:
        """Newest step that is whole on disk; None without one."""
        return max(_steps(self.directory), default=None)

    def save(self, step: int, state, meta: dict) -> None:
        """Starts saving in the background, once a save still running has ended; `state` may be donated afterwards.

        Args:
            step: finished updates.   state: dataclass of trees; fields without arrays are left out.
            meta: plain data, among it "config".
        """
        items = {name: ocp.args.PyTreeSave(nest(flatten(tree))) for name, tree in _fields(state).items()}
        items[_META] = ocp.args.JsonSave({"step": step} | meta)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def check(self) -> None:
        """Raises what a background save has run into, once it has ended; never waits."""
        # The manager's own check_for_errors stays silent about a failed write; joining its thread does not.
        if not self._manager.is_saving_in_progress():
            self._manager.wait_until_finished()

    def restore(self, state, step: int | None = None):
        """The saved state, laid out as `state` is, and its meta.

        Args:
            state: arrays or ShapeDtypeStructs; shapes, dtypes and shardings are taken from it.
            step: default: the latest.
        Raises:
            UserError: no checkpoint, or one that differs: every missing, extra and misshaped array is named.
        """
        steps = _steps(self.directory)
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            raise UserError(
                f"{self.directory}: no complete checkpoint {step or 'at all'}; there is {sorted(steps) or 'nothing'}"
            )
        path = self.directory / str(step)
        wanted = {name: flatten(tree) for name, tree in _fields(state).items()}
        _compare(path, wanted)
        fields = {}
        for name, flat in wanted.items():
            found = flatten(_read(path / name, nest(flat)))
            fields[name] = jax.tree.unflatten(jax.tree.structure(getattr(state, name)), [found[key] for key in flat])
        return dataclasses.replace(state, **fields), read_meta(path)

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


# ---- reading without a run -------------------------------------------------------------------------------------------


def kind(path) -> str:
    """What a checkpoint argument is: TRAINING (a workdir or one step of it) or RELEASED (a PyTorch directory).

    Raises:
        UserError: neither of the two, saying what was looked for.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        what = "a file, not a directory" if path.exists() else "no such directory"
        raise UserError(f"{path}: {what}; expected a training workdir, one step of it, or a released PyTorch directory")
    if _is_step(path) or _steps(path / "checkpoints"):
        return TRAINING
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: a training workdir without a complete checkpoint; train until the first save")
    if (path / "config.json").is_file() and any((path / name).is_file() for name in _WEIGHTS):
        return RELEASED
    raise UserError(
        f"{path}: not a checkpoint; expected a training workdir (checkpoints/STEP/), one step of it (params/, meta/), "
        f"or a released PyTorch directory (config.json and one of {', '.join(_WEIGHTS)})"
    )


def load_params(path):
    """The weights of a training workdir (its latest step) or of one step directory; averaged ones if it has them.

    Returns:
        config: dict, as it was saved.   params: nested dict of numpy arrays.   step: int.
    """
    path = pathlib.Path(path).absolute()
    if kind(path) != TRAINING:
        raise UserError(f"{path}: a released PyTorch directory; expected a training workdir or one step of it")
    meta, item = read_meta(step_directory(path)), _weights(path)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _metadata(item))
    params = ocp.PyTreeCheckpointHandler().restore(epath.Path(item), args=ocp.args.PyTreeRestore(restore_args=restore_args))
    return meta["config"], params, meta["step"]


def step_directory(path) -> pathlib.Path:
    """The step that a workdir (its latest) or a step directory means."""
    path = pathlib.Path(path).absolute()
    return path if _is_step(path) else path / "checkpoints" / str(max(_steps(path / "checkpoints")))


def _weights(path) -> pathlib.Path:
    """The item that holds the weights to use."""
    step = step_directory(path)
    return step / ("ema" if (step / "ema").is_dir() else "params")


def read_meta(path) -> dict:
    """The JSON part of one step directory."""
    return ocp.JsonCheckpointHandler().restore(epath.Path(pathlib.Path(path) / _META), args=ocp.args.JsonRestore())


def _steps(directory) -> list[int]:
    """Steps under `directory` that are whole on disk."""
    if not directory.is_dir():
        return []
    return [int(p.name) for p in ocp.utils.checkpoint_steps_paths(directory) if p.name.isdigit()]


def _is_step(path) -> bool:
    return (path / "params").is_dir() and (path / _META).is_dir() and ocp.utils.is_checkpoint_finalized(epath.Path(path))


# ---- one array at a time: conversion of models that do not fit memory ------------------------------------------------


def save_arrays(workdir, step: int, arrays: dict, meta: dict) -> None:
    """Writes a checkpoint of weights alone and returns when it is on disk.

    Args:
        arrays: numpy arrays by path; they may be mapped files, of which at most a few chunks are held in memory.
        meta: plain data, among it "config".
    """
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)  # Orbax warns of both choices below
    try:
        # Orbax's own array handler copies every array first, and its default format (OCDBT) buffers the whole checkpoint.
        handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
        params = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False)
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=1 << 26), nest(arrays))
        items = {
            "params": ocp.args.PyTreeSave(nest(arrays), save_args=chunks),
            _META: ocp.args.JsonSave({"step": step} | meta),
        }
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        directory = pathlib.Path(workdir).absolute() / "checkpoints"
        handlers = {"params": params, _META: ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
            manager.save(step, args=ocp.args.Composite(**items), force=True)
    finally:
        absl.setLevel(level)


def array_specs(path) -> dict:
    """Shape and dtype, by path, of the weights that `load_params` would read."""
    return flatten(_metadata(_weights(path)))


def read_array(path, key: str) -> np.ndarray:
    """One of the arrays that `array_specs` lists."""
    args = ocp.args.PyTreeRestore(
        nest({key: 0}), restore_args=nest({key: ocp.RestoreArgs(restore_type=np.ndarray)}), partial_restore=True
    )
    (array,) = jax.tree.leaves(ocp.PyTreeCheckpointHandler().restore(epath.Path(_weights(path)), args=args))
    return array


# ---- trees as flat paths ---------------------------------------------------------------------------------------------


def _fields(state) -> dict:
    """The state's fields that hold arrays."""
    trees = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


def flatten(tree) -> dict:
    """Leaves by path, in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") or _BARE: leaf for path, leaf in leaves}


def nest(flat: dict) -> dict:
    """Nested dicts from leaves by path: what `flatten` takes apart."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def _metadata(path):
    """Nested dict of shapes and dtypes of one item."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree


def _read(path, abstract):
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.PyTreeCheckpointHandler().restore(
        epath.Path(path), args=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
    )


def _compare(path, wanted: dict) -> None:
    """Raises one UserError that names every array that is missing, extra or of another shape or dtype."""
    saved_items = {p.name for p in path.iterdir() if p.is_dir()} - {_META}
    found = {f"{item}/{key}": leaf for item in saved_items for key, leaf in flatten(_metadata(path / item)).items()}
    wanted = {f"{item}/{key}": leaf for item, flat in wanted.items() for key, leaf in flat.items()}
    problems = [f"missing {key} {_spec(wanted[key])}" for key in sorted(wanted.keys() - found.keys())]
    problems += [f"extra {key} {_spec(found[key])}" for key in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{key} is {_spec(found[key])}, the run needs {_spec(wanted[key])}"
        for key in sorted(wanted.keys() & found.keys())
        if _spec(found[key]) != _spec(wanted[key])
    ]
    if problems:
        raise UserError(
            f"{path}: the checkpoint does not fit this config ({len(problems)} differences): " + "; ".join(problems)
        )


def _spec(leaf) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
