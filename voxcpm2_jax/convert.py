"""import-torch and export-torch: between released directories and training workdirs, tensor by tensor.

At most one parameter (all layers of a stack) is in memory at a time, so models that do not fit memory can be converted.
Nothing is computed. An export writes the backbone in the dtype that config.json names, if the checkpoint's is wider: training
keeps float32, and the PyTorch package casts to that dtype when it loads. So what was imported in it comes back byte for byte.
"""

import dataclasses
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Mapping

import numpy as np
from rich.console import Console

from voxcpm2_jax.checkpoint.arrays import array_specs, nest, read_array, save_arrays
from voxcpm2_jax.checkpoint.steps import step_directory
from voxcpm2_jax.config.plain import to_dict
from voxcpm2_jax.config.released import to_released
from voxcpm2_jax.data.tokenizer import load_tokenizer
from voxcpm2_jax.files import fresh_directory, write_json
from voxcpm2_jax.torch_io.files import (
    BACKBONE_FILE,
    VAE_FILE,
    Stored,
    assemble,
    cast,
    check_params,
    copy_tensors,
    progress,
    stack_layers,
    tensor_header,
    torch_tensors,
    write_safetensors,
)
from voxcpm2_jax.torch_io.released import OpenDirectory
from voxcpm2_jax.torch_io.tables import backbone_table, by_path
from voxcpm2_jax.workdir import RELEASED, Workdir, kind, refuse_lora, save_codec


def import_torch(source: str | os.PathLike, workdir: str | os.PathLike) -> None:
    """Turns a released directory into a training workdir with one checkpoint, step 0.

    The parameters are stacked in memory-mapped files in a scratch directory, from which the checkpoint is written.

    Raises:
        UserError: not a released directory (see `torch_io.load`), or `workdir` is not empty.
    """
    refuse_lora(pathlib.Path(source))
    opened = OpenDirectory(source)
    tokenizer = load_tokenizer(source)
    groups = by_path(opened.backbone_rows)
    config = {"model": to_dict(opened.released.model), "released": opened.released.raw}
    with fresh_directory(workdir) as aside:
        scratch = aside / "scratch"
        scratch.mkdir()
        arrays = {}
        for path, group in progress(groups.items(), "reading tensors"):
            mapped = functools.partial(_mapped, scratch / path.replace("/", "."))
            arrays[path] = stack_layers(opened.backbone, group, mapped)
        with Console(stderr=True).status("writing the checkpoint"):
            save_arrays(aside, 0, arrays, {"config": config})
        del arrays
        shutil.rmtree(scratch)
        write_json(aside / "config.json", config)
        save_codec(aside, opened.vae_config, nest(assemble(opened.vae, opened.vae_rows)))
        tokenizer.save(aside / "tokenizer")


def export_torch(path: str | os.PathLike, directory: str | os.PathLike, *, dtype: str | None = None) -> dict[str, dict]:
    """Turns any checkpoint into a directory that the PyTorch package loads: one safetensors file each for backbone and codec.

    Args:
        path: a training workdir, one step of it, or a released directory.
        dtype: a name of config.model.DTYPES: of the backbone's weights, and of the field in config.json, by which the PyTorch
            package computes. None: that of the checkpoint's config, for weights that are wider. The codec keeps its own.
    Returns:
        for "backbone" and "codec": "dtype" and "bytes" of the tensors written, "checkpoint_dtype" and "checkpoint_bytes".
    Raises:
        UserError: not a checkpoint, its weights do not fit its config, numbers that `dtype` cannot hold, or `directory` is not
            empty.
    """
    if kind(path) == RELEASED:
        opened = OpenDirectory(path)
        config, vae_config, raw, tokenizer_dir = opened.released.model, opened.vae_config, opened.released.raw, opened.directory
        codec, backbone = opened.vae, opened.backbone
    else:
        path = step_directory(path)  # of now: the run may save a newer step while this one is read
        work = Workdir(path)
        config, vae_config, raw, tokenizer_dir, codec = work.config, work.vae_config, work.raw, work.tokenizer_dir, work.vae
        specs = array_specs(path)
        groups = by_path(backbone_table(config))
        check_params(specs, groups, str(path))
        read = functools.partial(read_array, path)
        backbone = {
            name: Stored(np.dtype(spec.dtype), tuple(spec.shape), functools.partial(read, name)) for name, spec in specs.items()
        }
    tokenizer = load_tokenizer(tokenizer_dir)
    wanted = np.dtype(dtype or config.dtype)
    written = cast(backbone, lambda own: wanted if dtype or wanted.itemsize < own.itemsize else own)
    config = dataclasses.replace(config, dtype=dtype or config.dtype)
    with fresh_directory(directory) as aside:
        write_json(aside / "config.json", to_released(config, vae_config, raw))
        if kind(path) == RELEASED:
            copy_tensors(written, aside / BACKBONE_FILE)
        else:
            tensors = torch_tensors(groups, lambda name: written[name].read())
            write_safetensors(aside / BACKBONE_FILE, tensor_header(groups, written), tensors)
        copy_tensors(codec, aside / VAE_FILE)
        tokenizer.save(aside)
    return {"backbone": _figures(written, backbone), "codec": _figures(codec, codec)}


def _figures(written: Mapping[str, Stored], read: Mapping[str, Stored]) -> dict:
    figures = {}
    for prefix, leaves in ("", written), ("checkpoint_", read):
        names = {leaf.dtype.name for leaf in leaves.values()} - {"int32"}
        figures[f"{prefix}dtype"] = ", ".join(sorted(names))
        figures[f"{prefix}bytes"] = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in leaves.values())
    return figures


def _mapped(path: pathlib.Path, shape, dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype=dtype, mode="w+", shape=shape))
