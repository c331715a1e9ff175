"""TODO checkpoint.arrays."""

import dataclasses
import itertools
import json
import logging
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from voxcpm2_jax.checkpoint.integrity import verify, write_checksums
from voxcpm2_jax.checkpoint.steps import META, read_meta, step_directory, versions, weights_item
from voxcpm2_jax.config.plain import UserError

_BARE = "value"  # path of a field that is one array


def restore(path, state):
    """The state that a step directory holds, laid out as `state` is, and its meta; see `Checkpoints.restore`."""
    wanted = {name: flatten(tree) for name, tree in array_fields(state).items()}
    _compare(path, wanted)
    fields = {}
    for name, flat in wanted.items():
        found = flatten(_read(path / name, nest(flat)))
        fields[name] = jax.tree.unflatten(jax.tree.structure(getattr(state, name)), [found[key] for key in flat])
    return dataclasses.replace(state, **fields), read_meta(path)


def saved_config(path) -> dict:
    """The config that a workdir's latest step, or a step, was saved with; raises UserError if it is damaged."""
    verify(path, META)
    return read_meta(step_directory(path))["config"]


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


def array_specs(path) -> dict:
    """Shape and dtype, by path, of the weights that `load_params` would read; raises UserError if they are damaged."""
    verify(path, META, weights_item(path).name)
    return flatten(item_metadata(weights_item(path)))


def read_array(path, key: str) -> np.ndarray:
    """One of the arrays that `array_specs` lists.

    It is read chunk by chunk (a chunk is what one device held), for memory: all chunks at once, as Orbax reads, take the
    array's size three times. So the files are opened here the way that Orbax lays them out.
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


# ---- trees as flat paths ---------------------------------------------------------------------------------------------


def array_fields(state) -> dict:
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


def item_metadata(path):
    """Nested dict of shapes and dtypes of one item."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree


def _read(path, abstract):
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.PyTreeCheckpointHandler().restore(
        epath.Path(path), args=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
    )


def _compare(path, wanted: dict) -> None:
    """Raises one UserError that names every array that is missing, extra or of another shape or dtype."""
    saved_items = {p.name for p in path.iterdir() if p.is_dir()} - {META}
    found = {f"{item}/{key}": leaf for item in saved_items for key, leaf in flatten(item_metadata(path / item)).items()}
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
