"""Released directories, as the `voxcpm` package reads and writes them, whole in memory.

    config.json   model.safetensors   audiovae.safetensors | audiovae.pth   tokenizer.json ...

convert.py does the same tensor by tensor, for models that do not fit memory.
"""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from voxcpm2_jax.checkpoint.arrays import nest
from voxcpm2_jax.config.model import AudioVAEConfig, ModelConfig
from voxcpm2_jax.config.released import read_released, to_released
from voxcpm2_jax.data.tokenizer import Tokenizer, load_tokenizer
from voxcpm2_jax.files import fresh_directory, write_json
from voxcpm2_jax.torch_io.files import (
    BACKBONE_FILE,
    VAE_FILE,
    Stored,
    assemble,
    check_tensors,
    open_tensors,
    write_codec,
    write_params,
)
from voxcpm2_jax.torch_io.tables import BOUNDARIES, backbone_table, vae_table


@dataclass(frozen=True)
class Loaded:
    """A model and its codec in memory. Parameters are nested dicts of numpy arrays in the dtype of the file."""

    config: ModelConfig
    params: dict
    vae_config: AudioVAEConfig
    vae_params: dict
    raw: dict[str, Any] | None = field(repr=False)  # the imported config.json, unknown keys included; None: not imported
    tokenizer_dir: pathlib.Path = pathlib.Path()


def load(directory: str | os.PathLike) -> Loaded:
    """Reads a released directory. Its config decides which tensors must be there.

    Raises:
        UserError: a file is missing or unreadable, or tensors differ from the table (each is named).
    """
    source = OpenDirectory(directory)
    params = nest(assemble(source.backbone, source.backbone_rows))
    vae_params = nest(assemble(source.vae, source.vae_rows))
    return Loaded(source.released.model, params, source.vae_config, vae_params, source.released.raw, source.directory)


class OpenDirectory:
    """A released directory, opened and checked; of the tensors, only the headers are read."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.released = read_released(self.directory)
        if self.released.unknown:
            keys = ", ".join(self.released.unknown)
            warnings.warn(f"{self.directory / 'config.json'}: unknown keys {keys}; ignored, and kept for export", stacklevel=3)
        self.backbone_rows, self.vae_rows = backbone_table(self.released.model), vae_table(self.released.vae)
        self.backbone = open_tensors(self.directory, BACKBONE_FILE, f"{BACKBONE_FILE}.index.json", "pytorch_model.bin")
        self.vae = open_tensors(self.directory, VAE_FILE, "audiovae.pth")
        check_tensors(self.directory, (self.backbone, self.backbone_rows), (self.vae, self.vae_rows))
        self.vae_config = with_boundaries(self.released.vae, self.vae)


def with_boundaries(config: AudioVAEConfig, vae: Mapping[str, Stored]) -> AudioVAEConfig:
    """The config with the rate boundaries of the file of tensors, which override config.json as in the PyTorch package."""
    if config.sr_bin_boundaries is None:
        return config
    return dataclasses.replace(config, sr_bin_boundaries=tuple(int(hz) for hz in vae[BOUNDARIES].read()))


def save(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: Mapping,
    vae_config: AudioVAEConfig,
    vae_params: Mapping,
    tokenizer: Tokenizer | str | os.PathLike,
    raw: Mapping | None = None,
) -> None:
    """Writes a directory that the PyTorch package loads.

    Args:
        directory: absent or empty.   params, vae_params: arrays of numpy or jax, written in their dtype.
        tokenizer: a Tokenizer, or the directory or file of one.   raw: an imported config.json, whose own keys are kept.
    Raises:
        UserError: the directory is not empty, or parameters differ from the table (each is named).
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    with fresh_directory(directory) as aside:
        write_json(aside / "config.json", to_released(config, vae_config, raw))
        write_params(aside / BACKBONE_FILE, backbone_table(config), params)
        write_codec(aside / VAE_FILE, vae_config, vae_params)
        tokenizer.save(aside)
