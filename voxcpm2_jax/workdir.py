"""What a training run's directory holds, and how to read a CKPT argument.

    WORKDIR/config.json                  the config that the run was started with
    WORKDIR/metrics.jsonl                one JSON object per logged step
    WORKDIR/checkpoints/STEP/            a saved state (checkpoint/steps.py). Its meta holds the run's config; after
                                         import-torch this has a key "released", the config.json that was imported
    WORKDIR/codec/                       the codec that made the latents: audiovae.safetensors, config.json
    WORKDIR/tokenizer/                   the tokenizer that made the ids

A CKPT argument names a training workdir (its latest step), one step directory of it, or a released PyTorch directory.

Provenance: codec and tokenizer decide what latents and ids mean. Both have a SHA-256, which shards record as well, and shards
of another codec or tokenizer than the weights were trained on are refused. `train` copies both from the shards into the
workdir. A workdir of train-vae has neither: there the checkpoint is the codec.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from voxcpm2_jax.checkpoint.arrays import Weights, array_specs, flatten, nest, read_array, read_weights
from voxcpm2_jax.checkpoint.integrity import verify
from voxcpm2_jax.checkpoint.steps import META, complete_steps, is_step, read_meta, step_directory
from voxcpm2_jax.config.model import AudioVAEConfig, ModelConfig
from voxcpm2_jax.config.plain import UserError, from_dict, short, to_dict
from voxcpm2_jax.config.released import read_released
from voxcpm2_jax.data.tokenizer import load_tokenizer
from voxcpm2_jax.files import fresh_directory, write_json
from voxcpm2_jax.torch_io.files import (
    VAE_FILE,
    Stored,
    assemble,
    check_params,
    check_tensors,
    open_tensors,
    stack_layers,
    write_codec,
)
from voxcpm2_jax.torch_io.released import Loaded, OpenDirectory, with_boundaries
from voxcpm2_jax.torch_io.tables import backbone_table, by_path, param_shapes, vae_table

# ---- what a path is --------------------------------------------------------------------------------------------------

TRAINING, RELEASED = "training", "released"  # what `kind` returns

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "audiovae.safetensors", "audiovae.pth")


def kind(path: str | os.PathLike) -> str:
    """Whether a CKPT argument is TRAINING (a workdir or one step of it) or RELEASED (a PyTorch directory).

    Raises:
        UserError: it is neither.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        what = "a file, not a directory" if path.exists() else "no such directory"
        raise UserError(f"{path}: {what}; expected a training workdir, one step of it, or a released PyTorch directory")
    if is_step(path) or complete_steps(path / "checkpoints"):
        return TRAINING
    if (path / "checkpoints").is_dir():
        raise UserError(f"{path}: a training workdir without a complete checkpoint; train until the first save")
    if (path / "config.json").is_file() and any((path / name).is_file() for name in _WEIGHTS):
        return RELEASED
    refuse_lora(path)
    raise UserError(
        f"{path}: not a checkpoint; expected a training workdir (checkpoints/STEP/), one step of it (params/, meta/), "
        f"or a released PyTorch directory (config.json and one of {', '.join(_WEIGHTS)})"
    )


# What LoRA weights lie beside: the file that describes them, and its field for the model that they change.
_LORA = {"lora_config.json": "base_model", "adapter_config.json": "base_model_name_or_path"}  # PyTorch package, PEFT
_LORA_WEIGHTS = ("lora_weights.safetensors", "lora_weights.ckpt", "adapter_model.safetensors", "adapter_model.bin")


def refuse_lora(path: pathlib.Path) -> None:
    """Raises UserError for a directory of LoRA weights, or one that holds such directories."""
    found = next((p for p in (path, path / "lora", path / "latest", *sorted(path.glob("step_*"))) if _is_lora(p)), None)
    if found is None:
        return
    base = ""
    for name, field in _LORA.items():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            base = base or str(json.loads((found / name).read_text(encoding="utf-8"))[field] or "")
    advice = f"give its base {base}" if base else "give its base, which its files do not name,"
    raise UserError(
        f"{path}: LoRA weights, not a checkpoint; {advice} as the checkpoint, or weights that the LoRA is merged into "
        "(this package has no LoRA yet)"
    )


def _is_lora(path: pathlib.Path) -> bool:
    return any((path / name).is_file() for name in (*_LORA, *_LORA_WEIGHTS))


def _root(path: pathlib.Path) -> pathlib.Path:
    """The workdir of a workdir or of one of its steps."""
    return path if (path / "checkpoints").is_dir() else path.parent.parent


def _saved_config(path: str | os.PathLike) -> dict:
    """The config that the step was saved with; raises UserError if it is damaged."""
    verify(path, META)
    return read_meta(step_directory(path))["config"]


# ---- weights ---------------------------------------------------------------------------------------------------------


def load_params(path: str | os.PathLike) -> tuple[dict, dict, int]:
    """Reads the weights of a training workdir or of one step, the averaged ones if it has them.

    Returns:
        config: dict, as it was saved.   params: nested dict of numpy arrays.   step: int.
    """
    path = pathlib.Path(path).absolute()
    if kind(path) != TRAINING:
        raise UserError(f"{path}: a released PyTorch directory; expected a training workdir or one step of it")
    params = read_weights(path)
    meta = read_meta(step_directory(path))
    return meta["config"], params, meta["step"]


class OpenModel(NamedTuple):
    """Like `Loaded`, but the backbone's parameters are still on disk."""

    config: ModelConfig
    weights: Weights  # checked; averaged weights, if the checkpoint has them
    vae_config: AudioVAEConfig
    vae_params: dict
    raw: dict[str, Any] | None
    tokenizer_dir: pathlib.Path


def open_model(path: str | os.PathLike) -> OpenModel:
    """Opens the model of any CKPT; reads its codec and finds its tokenizer.

    Raises:
        UserError: not a checkpoint, or a workdir without codec/ or tokenizer/.
    """
    if kind(path) == RELEASED:
        source = OpenDirectory(path)
        vae_params = nest(assemble(source.vae, source.vae_rows))
        return OpenModel(
            source.released.model, _weights_of_released(source), source.vae_config, vae_params, source.released.raw,
            source.directory,
        )  # fmt: skip
    work = Workdir(path)
    vae_params = nest(assemble(work.vae, vae_table(work.vae_config)))
    weights = _weights_of_training(path, work.config)
    return OpenModel(work.config, weights, work.vae_config, vae_params, work.raw, work.tokenizer_dir)


def open_configs(path: str | os.PathLike) -> tuple[ModelConfig, AudioVAEConfig, pathlib.Path]:
    """The configuration of the model and of the codec of any CKPT, and the directory of its tokenizer; reads no weights."""
    if kind(path) == RELEASED:
        released = read_released(path)
        return released.model, released.vae, pathlib.Path(path)
    work = Workdir(path)
    return work.config, work.vae_config, work.tokenizer_dir


def load_model(path: str | os.PathLike) -> Loaded:
    """`open_model`, with the backbone's parameters read into memory."""
    opened = open_model(path)
    params = nest({key: opened.weights.read(key) for key in opened.weights.shapes})
    return Loaded(opened.config, params, opened.vae_config, opened.vae_params, opened.raw, opened.tokenizer_dir)


def _weights_of_released(source: OpenDirectory) -> Weights:
    groups = by_path(source.backbone_rows)
    return Weights(param_shapes(groups), lambda key: stack_layers(source.backbone, groups[key]))


def _weights_of_training(path: str | os.PathLike, config: ModelConfig) -> Weights:
    path = step_directory(path)  # of now: the run may save a newer step while this one is read
    groups = by_path(backbone_table(config))
    check_params(array_specs(path), groups, str(path))
    return Weights(param_shapes(groups), functools.partial(read_array, path))


class Workdir:
    """A training workdir, or one step of it, opened and checked; of the tensors, only the codec's headers are read.

    Attributes:
        config: of the model.   raw: the imported config.json, or None.   vae_config, vae: the codec.   tokenizer_dir.
    Raises:
        UserError: no codec/ or tokenizer/.
    """

    def __init__(self, path: str | os.PathLike):
        path = pathlib.Path(path).absolute()
        codec, self.tokenizer_dir = _root(path) / "codec", _root(path) / "tokenizer"
        for directory in (codec, self.tokenizer_dir):
            if not directory.is_dir():
                raise UserError(f"{directory}: no such directory; a workdir keeps its codec and tokenizer beside checkpoints/")
        config = _saved_config(path)
        self.config = from_dict(ModelConfig, config.get("model", {}), where=f"{path}: config.model")
        self.raw = config.get("released")
        self.vae_config, self.vae = _open_codec(codec)


def open_weights(path: str | os.PathLike, config: ModelConfig) -> Weights:
    """Opens the backbone of any CKPT (averaged weights if it has them) to start a training of the model `config` from.

    Raises:
        UserError: not a checkpoint, its model differs (each field is named), or its parameters do not fit its own config.
    """
    if kind(path) == RELEASED:
        source = OpenDirectory(path)
        theirs, weights = source.released.model, _weights_of_released(source)
    else:
        saved = _saved_config(path)
        if "model" not in saved:
            raise UserError(f"{path}: a checkpoint of a codec; expected one of a backbone")
        theirs = from_dict(ModelConfig, saved["model"], where=f"{path}: config.model")
        weights = _weights_of_training(path, theirs)
    _check_same_model(path, theirs, config)
    return weights


# Fields in which a checkpoint's model may differ from the run's: the weights mean the same in both.
_MAY_CHANGE = ("dtype", "max_length", "dit_config.cfm_config", "lm_config.dim_model_base", "lm_config.bos_token_id",
               "lm_config.eos_token_id")  # fmt: skip
_MUP = ("lm_config.scale_emb", "lm_config.scale_depth")  # have no effect without use_mup


def _check_same_model(path, theirs: ModelConfig, ours: ModelConfig) -> None:
    may_change = _MAY_CHANGE if theirs.lm_config.use_mup or ours.lm_config.use_mup else (*_MAY_CHANGE, *_MUP)
    pairs = zip(_flat(to_dict(theirs)).items(), _flat(to_dict(ours)).values(), strict=True)
    wrong = [
        f"model.{name} {short(there)} there, {short(here)} here"
        for (name, there), here in pairs
        if there != here and not name.startswith(may_change)
    ]
    if wrong:
        hint = "; a vocabulary cannot be resized" if any("vocab_size" in w for w in wrong) else ""
        raise UserError(f"{path}: weights of another model than the config's: {'; '.join(wrong)}{hint}")


def _flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# ---- the codec -------------------------------------------------------------------------------------------------------


def save_codec(workdir: str | os.PathLike, config: AudioVAEConfig, vae_params: Mapping) -> None:
    """Writes WORKDIR/codec/, which must not exist yet or be empty."""
    with fresh_directory(pathlib.Path(workdir) / "codec") as aside:
        write_json(aside / "config.json", to_dict(config))
        write_codec(aside / VAE_FILE, config, vae_params)


def load_codec(path: str | os.PathLike) -> tuple[AudioVAEConfig, dict]:
    """Reads the codec of a CKPT of train-vae or train, of a directory of shards, or of a released directory.

    Returns:
        vae_config, and vae_params as nested dicts of numpy arrays.
    Raises:
        UserError: none of these, or tensors that its config does not describe.
    """
    path = pathlib.Path(path).absolute()
    if (path / "codec").is_dir():
        return _read_codec(*_open_codec(path / "codec"))
    if kind(path) == RELEASED:
        config, tensors = read_released(path).vae, open_tensors(path, VAE_FILE, "audiovae.pth")
        check_tensors(path, (tensors, vae_table(config)))
        return _read_codec(with_boundaries(config, tensors), tensors)
    config = _saved_config(path)
    if "vae" not in config:
        return _read_codec(*_open_codec(_root(path) / "codec"))
    vae_config = from_dict(AudioVAEConfig, config["vae"], where=f"{path}: config.vae")
    _, params, _ = load_params(path)
    check_params(flatten(params), by_path(vae_table(vae_config)), str(path))
    return vae_config, params


def _open_codec(directory: pathlib.Path) -> tuple[AudioVAEConfig, dict[str, Stored]]:
    """Opens and checks a codec/ directory without reading its tensors."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    config = from_dict(AudioVAEConfig, content, where=str(path))
    tensors = open_tensors(directory, VAE_FILE)
    check_tensors(directory, (tensors, vae_table(config)))
    return config, tensors


def _read_codec(config: AudioVAEConfig, tensors: Mapping[str, Stored]) -> tuple[AudioVAEConfig, dict]:
    return config, nest(assemble(tensors, vae_table(config)))


# ---- provenance ------------------------------------------------------------------------------------------------------


def codec_sha256(vae_params: Mapping, vae_config: AudioVAEConfig) -> str:
    """Hash of a codec: of its config and of every parameter, by path."""
    digest = hashlib.sha256(json.dumps(to_dict(vae_config), sort_keys=True).encode())
    leaves = jax.tree_util.tree_leaves_with_path(vae_params)
    for path, leaf in sorted((jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def provenance(path: str | os.PathLike) -> dict[str, str]:
    """Hashes of the codec and the tokenizer of a CKPT of a backbone, under the names of the shards' header.

    A workdir needs no checkpoint for this. A released tokenizer.json is hashed in the form in which `Tokenizer.save` writes
    it, because that is the file that `prepare` keeps and hashes.
    """
    path = pathlib.Path(path).absolute()
    own = path / "tokenizer"
    if not own.is_dir():
        own = path if kind(path) == RELEASED else _root(path) / "tokenizer"
    vae_config, vae_params = load_codec(path)
    return {"codec_sha256": codec_sha256(vae_params, vae_config), "tokenizer_sha256": load_tokenizer(own).sha256}


def check_provenance(path: str | os.PathLike, header, *, name: str = "", advice: str = "") -> None:
    """Raises UserError unless shards were made with the codec and the tokenizer of `path`; the message has the hashes.

    Args:
        path: as in `provenance`.   header: of the shards.
        name: how the message calls `path`.   advice: what to do; default: prepare the shards with the codec of `path`.
    """
    ours = provenance(path)
    wrong = [part for part in ours if ours[part] != getattr(header, part)]
    if wrong:
        parts = [part.removesuffix("_sha256") for part in wrong]
        sums = [f"{part}: here {ours[full]:.12}, shards {getattr(header, full):.12}" for part, full in zip(parts, wrong)]
        advice = advice or f"prepare them with --vae={path} and --config.tokenizer set to its tokenizer"
        raise UserError(
            f"the shards were not made with the {' and '.join(parts)} of {name or path} ({'; '.join(sums)}, SHA-256): {advice}"
        )
