"""import-torch and export-torch: between released directories and training workdirs, tensor by tensor.

At most one parameter (all layers of a stack) is in memory at a time, so models that do not fit memory can be converted.
Nothing is computed: an import followed by an export returns the same bytes.
"""

import functools
import os
import pathlib
import shutil

import numpy as np
from rich.console import Console

from voxcpm2_jax.checkpoint.arrays import array_specs, nest, read_array, save_arrays
from voxcpm2_jax.config.plain import to_dict
from voxcpm2_jax.config.released import to_released
from voxcpm2_jax.data.tokenizer import load_tokenizer
from voxcpm2_jax.files import fresh_directory, write_json
from voxcpm2_jax.torch_io.files import (
    BACKBONE_FILE,
    VAE_FILE,
    assemble,
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
from voxcpm2_jax.workdir import RELEASED, Workdir, kind, save_codec


def import_torch(source: str | os.PathLike, workdir: str | os.PathLike) -> None:
    """Turns a released directory into a training workdir with one checkpoint, step 0.

    The parameters are stacked in memory-mapped files in a scratch directory, from which the checkpoint is written.

    Raises:
        UserError: not a released directory (see `torch_io.load`), or `workdir` is not empty.
    """
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


def export_torch(path: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Turns a training workdir, or one step of it, into a directory that the PyTorch package loads.

    A released directory is copied, with its weights in one safetensors file each for backbone and codec.

    Raises:
        UserError: not a checkpoint, its weights do not fit its config, or `directory` is not empty.
    """
    if kind(path) == RELEASED:
        opened = OpenDirectory(path)
        tokenizer = load_tokenizer(opened.directory)
        with fresh_directory(directory) as aside:
            write_json(aside / "config.json", to_released(opened.released.model, opened.vae_config, opened.released.raw))
            copy_tensors(opened.backbone, aside / BACKBONE_FILE)
            copy_tensors(opened.vae, aside / VAE_FILE)
            tokenizer.save(aside)
        return
    work = Workdir(path)
    tokenizer = load_tokenizer(work.tokenizer_dir)
    groups = by_path(backbone_table(work.config))
    specs = array_specs(path)
    check_params(specs, groups, str(path))
    with fresh_directory(directory) as aside:
        write_json(aside / "config.json", to_released(work.config, work.vae_config, work.raw))
        read = functools.partial(read_array, path)
        write_safetensors(aside / BACKBONE_FILE, tensor_header(groups, specs), torch_tensors(groups, read))
        copy_tensors(work.vae, aside / VAE_FILE)
        tokenizer.save(aside)


def _mapped(path: pathlib.Path, shape, dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype=dtype, mode="w+", shape=shape))
