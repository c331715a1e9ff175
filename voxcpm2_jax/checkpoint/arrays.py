"""The arrays of a checkpoint: a whole state restored strictly onto any mesh, the weights alone, or one array at a time.

Arrays are stored by path alone ("base_lm/layers/q/kernel"), never by the classes that hold them, so a file does not depend
on how optax or a state class is built. `flatten` and `nest` convert between trees and such paths.
"""

import dataclasses
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from voxcpm2_jax.checkpoint.integrity import verify, write_checksums
from voxcpm2_jax.checkpoint.steps import META, read_meta, versions, weights_item
from voxcpm2_jax.config.plain import UserError

# ---- trees and paths -------------------------------------------------------------------------------------------------

_BARE = "value"  # path of a field that is one array


def flatten(tree) -> dict:
    """Leaves by path, in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") or _BARE: leaf for path, leaf in leaves}


def nest(flat: Mapping) -> dict:
    """Nested dicts from leaves by path; the inverse of `flatten` for a tree of dicts."""
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return nested


def array_fields(state) -> dict:
    """The fields of a state (a dataclass of trees) that hold arrays."""
    trees = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


# ---- a whole state ---------------------------------------------------------------------------------------------------


def restore(path: pathlib.Path, state):
    """Reads one step directory.

    Args:
        state: dataclass of trees of arrays or ShapeDtypeStructs, whose shapes, dtypes and shardings the result takes.
    Returns:
        The state, and the meta of the step.
    Raises:
        UserError: the step differs from `state`; every missing, extra and misshaped array is named.
    """
    wanted = {name: flatten(tree) for name, tree in array_fields(state).items()}
    _compare(path, wanted)
    fields = {}
    for name, flat in wanted.items():
        found = flatten(_read(path / name, nest(flat)))
        fields[name] = jax.tree.unflatten(jax.tree.structure(getattr(state, name)), [found[key] for key in flat])
    return dataclasses.replace(state, **fields), read_meta(path)


def _read(path, abstract):
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.PyTreeCheckpointHandler().restore(
        epath.Path(path), args=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
    )


def _compare(path, wanted: dict) -> None:
    """Raises one UserError that names every array that is missing, extra, or has another shape or dtype."""
    saved_items = {p.name for p in path.iterdir() if p.is_dir()} - {META}
    found = {f"{item}/{key}": leaf for item in saved_items for key, leaf in flatten(_specs(path / item)).items()}
    wanted = {f"{item}/{key}": leaf for item, flat in wanted.items() for key, leaf in flat.items()}
    problems = [f"missing {key} {_describe(wanted[key])}" for key in sorted(wanted.keys() - found.keys())]
    problems += [f"extra {key} {_describe(found[key])}" for key in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{key} is {_describe(found[key])}, the run needs {_describe(wanted[key])}"
        for key in sorted(wanted.keys() & found.keys())
        if _describe(found[key]) != _describe(wanted[key])
    ]
    if problems:
        raise UserError(
            f"{path}: the checkpoint does not fit this config ({len(problems)} differences): " + "; ".join(problems)
        )


def _describe(leaf) -> str:
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _specs(item: pathlib.Path):
    """Nested dicts of the shapes and dtypes of one item."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(item)).tree


# ---- weights, on one machine -----------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Parameters on disk that were checked; `read` reads one of them."""

    shapes: dict[str, tuple[int, ...]]  # by path
    read: Callable[[str], np.ndarray]  # path -> array, in the dtype of the file


def read_weights(path: str | os.PathLike) -> dict:
    """The weights of a step, or of a workdir's latest step, as nested dicts of numpy arrays; averaged ones if it has them.

    Raises:
        UserError: they are damaged.
    """
    item = weights_item(path)
    verify(path, META, item.name)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _specs(item))
    return ocp.PyTreeCheckpointHandler().restore(epath.Path(item), args=ocp.args.PyTreeRestore(restore_args=restore_args))


def array_specs(path: str | os.PathLike) -> dict:
    """Shapes and dtypes, by path, of the weights that `read_weights` would read; raises UserError if they are damaged."""
    verify(path, META, weights_item(path).name)
    return flatten(_specs(weights_item(path)))


def read_array(path: str | os.PathLike, key: str) -> np.ndarray:
    """Reads one of the arrays that `array_specs` lists, in little more memory than the array itself takes.

    Orbax reads all chunks of an array at once, which takes three times the size of the array. This reads them one by one
    (a chunk is what one device held) from the files that Orbax wrote.
    """
    item = weights_item(path)
    layout = json.loads((item / "_METADATA").read_text(encoding="utf-8"))
    name = key.replace("/", ".")
    if layout["use_ocdbt"]:
        store = {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{item}/{name}/"}
    driver = "zarr3" if layout.get("use_zarr3") else "zarr"
    source = ts.open({"driver": driver, "kvstore": store}, open=True).result()
    array = np.empty(source.shape, source.dtype.numpy_dtype)
    chunk = source.chunk_layout.read_chunk.shape
    for corner in itertools.product(*(range(0, size, step) for size, step in zip(source.shape, chunk))):
        where = tuple(slice(start, min(start + step, size)) for start, step, size in zip(corner, chunk, source.shape))
        array[where] = source[where].read().result()
    return array


def save_arrays(workdir: str | os.PathLike, step: int, arrays: dict, meta: dict) -> None:
    """Writes a checkpoint that holds only weights; returns when it is on disk.

    Args:
        arrays: numpy arrays by path; if they are mapped files, only a few chunks at a time are in memory.
        meta: plain data, with "config" in it.
    """
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)  # Orbax warns about both of the following choices
    try:
        # Orbax's own array handler copies every array first, and its default format (OCDBT) buffers the whole checkpoint.
        handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
        params = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_ocdbt=False)
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=1 << 26), nest(arrays))
        items = {
            "params": ocp.args.PyTreeSave(nest(arrays), save_args=chunks),
            META: ocp.args.JsonSave({"step": step, "versions": versions()} | meta),
        }
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        directory = pathlib.Path(workdir).absolute() / "checkpoints"
        handlers = {"params": params, META: ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(directory, options=options, item_handlers=handlers) as manager:
            manager.save(step, args=ocp.args.Composite(**items), force=True)
        write_checksums(directory / str(step))
    finally:
        absl.setLevel(level)
