"""PyTorch directories both ways: one table of torch name <-> parameter path <-> transform.

    config.json   model.safetensors   audiovae.safetensors | audiovae.pth   tokenizer.json ...      what `voxcpm` reads

A `Row` of the table says where one torch tensor lives here: its dims are split (heads), permuted (kernels are stored
input dims first), and, in a transformer stack, laid at one index of the stacked layer axis. Nothing is computed, so a
round trip gives every byte back; tensors keep the dtype they came in. Import is strict: every missing, unexpected,
misshaped and mistyped tensor is named in one message.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import sys
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open

from voxcpm2_jax import checkpoint
from voxcpm2_jax.config import AudioVAEConfig, LMConfig, ModelConfig, UserError, from_dict, read_released, to_dict, to_released
from voxcpm2_jax.data.tokenizer import Tokenizer, load_tokenizer

BACKBONE_FILE, VAE_FILE = "model.safetensors", "audiovae.safetensors"
_BOUNDARIES = "decoder.sr_bin_boundaries"  # int32, the one tensor that is no parameter
DTYPES = {  # in the order in which a file lays them out
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


# ---- the table -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Where one torch tensor lives: ours = torch.reshape(split).transpose(order), at `layer` of a stacked parameter."""

    name: str  # torch
    path: str | None  # ours; None: no parameter, the config holds it
    torch_shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Ours, without the layer axis."""
        return tuple(self.split[i] for i in self.order)

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.reshape(self.split).transpose(self.order)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(np.argsort(self.order)).reshape(self.torch_shape)


def backbone_table(config: ModelConfig) -> list[Row]:
    """Every tensor of `model.safetensors`: 577 in the released shape."""
    rows = []

    def add(name, path, split, order=None, *, torch_shape=None, layer=None):
        order = order or tuple(range(len(split)))
        rows.append(Row(name, path, torch_shape or split, split, order, layer))

    def linear(name, path, num_in, num_out, *, bias=True):
        add(f"{name}.weight", f"{path}/kernel", (num_out, num_in), (1, 0))
        if bias:
            add(f"{name}.bias", f"{path}/bias", (num_out,))

    for name, path, stack in (
        ("base_lm", "base_lm", config.tslm),
        ("residual_lm", "residual_lm", config.ralm),
        ("feat_encoder.encoder", "feat_encoder", config.locenc),
        ("feat_decoder.estimator.decoder", "feat_decoder", config.locdit),
    ):
        D, F, N, K, H = stack.width, stack.mlp_width, stack.num_heads, stack.num_kv_heads, stack.head_dim
        for i in range(stack.num_layers):
            block, layers = f"{name}.layers.{i}", f"{path}/layers"
            for which, heads in (("q", N), ("k", K), ("v", K)):
                add(f"{block}.self_attn.{which}_proj.weight", f"{layers}/{which}/kernel", (heads, H, D), (2, 0, 1),
                    torch_shape=(heads * H, D), layer=i)  # fmt: skip
            add(f"{block}.self_attn.o_proj.weight", f"{layers}/o/kernel", (D, N, H), (1, 2, 0), torch_shape=(D, N * H), layer=i)
            add(f"{block}.mlp.gate_proj.weight", f"{layers}/gate/kernel", (F, D), (1, 0), layer=i)
            add(f"{block}.mlp.up_proj.weight", f"{layers}/up/kernel", (F, D), (1, 0), layer=i)
            add(f"{block}.mlp.down_proj.weight", f"{layers}/down/kernel", (D, F), (1, 0), layer=i)
            add(f"{block}.input_layernorm.weight", f"{layers}/attn_norm/scale", (D,), layer=i)
            add(f"{block}.post_attention_layernorm.weight", f"{layers}/mlp_norm/scale", (D,), layer=i)
        add(f"{name}.norm.weight", f"{path}/norm/scale", (D,))

    C, Q = config.feat_dim, config.scalar_quantization_latent_dim
    D, E, T = config.tslm.width, config.locenc.width, config.locdit.width
    add("base_lm.embed_tokens.weight", "base_lm/embed/embedding", (config.lm_config.vocab_size, D))
    add("feat_encoder.special_token", "feat_encoder/special_token", (E,), torch_shape=(1, 1, 1, E))
    linear("feat_encoder.in_proj", "feat_encoder/in_proj", C, E)
    linear("feat_decoder.estimator.in_proj", "feat_decoder/in_proj", C, T)
    linear("feat_decoder.estimator.cond_proj", "feat_decoder/cond_proj", C, T)
    linear("feat_decoder.estimator.out_proj", "feat_decoder/out_proj", T, C)
    for mlp in ("time_mlp", "delta_time_mlp"):
        for half in ("linear_1", "linear_2"):
            linear(f"feat_decoder.estimator.{mlp}.{half}", f"feat_decoder/{mlp}/{half}", T, T)
    for name, num_in, num_out in (
        ("fsq_layer/in_proj", D, Q),
        ("fsq_layer/out_proj", Q, D),
        ("enc_to_lm_proj", E, D),
        ("lm_to_dit_proj", D, T),
        ("res_to_dit_proj", D, T),
        ("fusion_concat_proj", 2 * D, D),
        ("stop_proj", D, D),
    ):
        linear(name.replace("/", "."), name, num_in, num_out)
    linear("stop_head", "stop_head", D, 2, bias=False)
    return rows


def vae_table(config: AudioVAEConfig) -> list[Row]:
    """Every tensor of `audiovae.safetensors`: 312 in the released shape."""
    rows = []

    def vector(name, path, size, torch_shape):
        rows.append(Row(name, path, torch_shape, (size,), (0,)))

    def snake(name, path, channels):
        vector(f"{name}.alpha", f"{path}/alpha", channels, (1, channels, 1))

    def conv(name, path, num_in, num_out, width, groups=1, *, is_transposed=False):
        # torch has [out, in / groups, width], transposed [in, out, width]; ours are width, in, out. Gains follow dim 0.
        shape = (num_in, num_out, width) if is_transposed else (num_out, num_in // groups, width)
        rows.append(Row(f"{name}.weight_v", f"{path}/kernel", shape, shape, (2, 0, 1) if is_transposed else (2, 1, 0)))
        vector(f"{name}.weight_g", f"{path}/gain", shape[0], (shape[0], 1, 1))
        vector(f"{name}.bias", f"{path}/bias", num_out, (num_out,))

    def units(name, path, channels, first):
        groups = channels if config.depthwise else 1
        for i in range(3):
            unit, ours = f"{name}.{first + i}.block", f"{path}/unit_{i}"
            snake(f"{unit}.0", f"{ours}/snake_in", channels)
            conv(f"{unit}.1", f"{ours}/conv_in", channels, channels, 7, groups)
            snake(f"{unit}.2", f"{ours}/snake_out", channels)
            conv(f"{unit}.3", f"{ours}/conv_out", channels, channels, 1)

    E, C, D = config.encoder_dim, config.latent_dim, config.decoder_dim
    conv("encoder.block.0", "encoder/conv_in", 1, E, 7)
    for i, stride in enumerate(config.encoder_rates):
        name, path, channels = f"encoder.block.{i + 1}.block", f"encoder/block_{i}", E * 2**i
        units(name, path, channels, 0)
        snake(f"{name}.3", f"{path}/snake", channels)
        conv(f"{name}.4", f"{path}/down", channels, 2 * channels, 2 * stride)
    for which in ("mu", "logvar"):
        conv(f"encoder.fc_{which}", f"encoder/{which}", E * 2 ** len(config.encoder_rates), C, 3)
    if config.depthwise:
        conv("decoder.model.0", "decoder/conv_in", C, C, 7, C)
        conv("decoder.model.1", "decoder/proj", C, D, 1)
    else:
        conv("decoder.model.0", "decoder/conv_in", C, D, 7)
    first = 2 if config.depthwise else 1
    for i, stride in enumerate(config.decoder_rates):
        name, path, num_in, num_out = f"decoder.model.{first + i}.block", f"decoder/block_{i}", D // 2**i, D // 2 ** (i + 1)
        if config.sr_bin_boundaries is not None:
            shape = (len(config.sr_bin_boundaries) + 1, num_in)
            for which in ("scale", "bias"):
                rows.append(
                    Row(f"decoder.sr_cond_model.{first + i}.{which}_embed.weight", f"{path}/rate/{which}", shape, shape, (0, 1))
                )
        snake(f"{name}.0", f"{path}/snake", num_in)
        conv(f"{name}.1", f"{path}/up", num_in, num_out, 2 * stride, is_transposed=True)
        units(name, path, num_out, 2)
    last = first + len(config.decoder_rates)
    snake(f"decoder.model.{last}", "decoder/snake", D // 2 ** len(config.decoder_rates))
    conv(f"decoder.model.{last + 1}", "decoder/conv_out", D // 2 ** len(config.decoder_rates), 1, 7)
    if config.sr_bin_boundaries is not None:
        size = (len(config.sr_bin_boundaries),)
        rows.append(Row(_BOUNDARIES, None, size, size, (0,)))
    return rows


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """A released directory. Parameters are nested dicts of numpy arrays in the dtype of the file."""

    config: ModelConfig
    params: dict
    vae_config: AudioVAEConfig
    vae_params: dict
    raw: dict[str, Any] = field(repr=False)  # config.json as it is, unknown keys included
    tokenizer_dir: pathlib.Path = pathlib.Path()


class Stored(NamedTuple):
    """A tensor on disk."""

    dtype: np.dtype | str  # str: one that we have no use for
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def load(directory: str | os.PathLike) -> Loaded:
    """Reads a released directory whole; its config decides which tensors must be there.

    Raises:
        UserError: a file is missing or unreadable, or tensors differ from the table (each is named).
    """
    source = _Source(directory)
    params, vae_params = (
        checkpoint.nest(_assemble(source.backbone, source.backbone_rows)),
        checkpoint.nest(_assemble(source.vae, source.vae_rows)),
    )
    return Loaded(source.released.model, params, source.vae_config, vae_params, source.released.raw, source.directory)


class _Source:
    """A released directory, opened and checked, nothing read yet."""

    def __init__(self, directory):
        self.directory = pathlib.Path(directory)
        self.released = read_released(self.directory)
        if self.released.unknown:
            keys = ", ".join(self.released.unknown)
            warnings.warn(f"{self.directory / 'config.json'}: no part reads {keys}; kept for export", stacklevel=3)
        self.backbone_rows, self.vae_rows = backbone_table(self.released.model), vae_table(self.released.vae)
        self.backbone = _open(self.directory, BACKBONE_FILE, f"{BACKBONE_FILE}.index.json", "pytorch_model.bin")
        self.vae = _open(self.directory, VAE_FILE, "audiovae.pth")
        _refuse(self.directory, _differences(self.backbone, self.backbone_rows) + _differences(self.vae, self.vae_rows))
        self.vae_config = _with_boundaries(self.released.vae, self.vae)


_HINTS = {
    "lora": "hint: merge the LoRA into the weights first, or keep it in a lora_weights.safetensors of its own",
    "audio_vae.": f"hint: move the audio_vae. tensors to {VAE_FILE}, without that prefix",
}


def _refuse(directory: pathlib.Path, differences: list[str]) -> None:
    if differences:
        hints = [hint for mark, hint in _HINTS.items() if any(d.startswith("unexpected") and mark in d for d in differences)]
        what = "; ".join(differences + hints)
        raise UserError(f"{directory}: {len(differences)} tensors differ from what config.json describes: {what}")


def _with_boundaries(config: AudioVAEConfig, vae: Mapping[str, Stored]) -> AudioVAEConfig:
    """As in the reference, the file's boundaries count where config.json has others."""
    if config.sr_bin_boundaries is None:
        return config
    return dataclasses.replace(config, sr_bin_boundaries=tuple(int(hz) for hz in vae[_BOUNDARIES].read()))


def _open(directory: pathlib.Path, *names: str) -> dict[str, Stored]:
    """The tensors of the first of these files that is there."""
    for name in names:
        path = directory / name
        if not path.exists():
            continue
        if name.endswith(".index.json"):
            try:
                shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{path}: not an index of shards ({error!r})") from None
            return {k: v for shard in shards for k, v in _open_safetensors(directory / pathlib.Path(shard).name).items()}
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    raise UserError(f"{directory}: expected one of {', '.join(names)}, found none")


def _open_safetensors(path: pathlib.Path) -> dict[str, Stored]:
    try:
        file = safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though the index names it") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    return {
        name: Stored(DTYPES.get(s.get_dtype(), s.get_dtype()), tuple(s.get_shape()), lambda name=name: file.get_tensor(name))
        for name, s in slices.items()
    }


def _open_pickle(path: pathlib.Path) -> dict[str, Stored]:
    """A torch file; only tensors are unpickled, and mapped rather than read where the file allows it."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: reading it needs PyTorch (pip install torch), or convert it to .safetensors") from None
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path}: not a plain torch file of tensors ({str(error).splitlines()[0]})") from None
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path}: expected a dict of tensors, plain or under 'state_dict'")
    dtypes = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int32: "I32"}

    def read(tensor):
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return {
        name: Stored(
            DTYPES[dtypes[t.dtype]] if t.dtype in dtypes else str(t.dtype), tuple(t.shape), lambda t=t: read(t.detach())
        )
        for name, t in tensors.items()
    }


def _differences(tensors: Mapping[str, Stored], rows: list[Row]) -> list[str]:
    """Every tensor that is missing, unexpected, misshaped or mistyped, in words."""
    wanted = {row.name: row for row in rows}
    problems = [f"missing {row.name} [{','.join(map(str, row.torch_shape))}]" for row in rows if row.name not in tensors]
    problems += [f"unexpected {name} {tensor}" for name, tensor in tensors.items() if name not in wanted]
    dtypes: dict[str, np.dtype] = {}
    for name, row in wanted.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != row.torch_shape:
            problems.append(f"{name} is {tensor}, expected shape [{','.join(map(str, row.torch_shape))}]")
        allowed = {DTYPES["I32"]} if row.path is None else {DTYPES[k] for k in ("BF16", "F16", "F32")}
        if tensor.dtype not in allowed:
            problems.append(f"{name} is {tensor}, expected {' or '.join(sorted(d.name for d in allowed))}")
        elif dtypes.setdefault(row.path, tensor.dtype) != tensor.dtype:
            problems.append(f"{name} is {tensor}, other layers are {dtypes[row.path]}")
    return problems


def _by_path(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each parameter, layers in order."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        if row.path is not None:
            grouped.setdefault(row.path, []).append(row)
    return grouped


def _assemble(tensors: Mapping[str, Stored], rows: list[Row]) -> dict[str, np.ndarray]:
    return {path: _stack(tensors, group) for path, group in _by_path(rows).items()}


def _stack(tensors, group, empty=np.empty) -> np.ndarray:
    """One parameter from its torch tensors, in memory that `empty` gives."""
    first = group[0]
    shape = first.shape if first.layer is None else (len(group), *first.shape)
    array = empty(shape, tensors[first.name].dtype)
    for row in group:
        array[... if row.layer is None else row.layer] = row.from_torch(tensors[row.name].read())
    return array


# ---- weights to start a training from --------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Parameters on disk, found to be whole; one is read at a time."""

    shapes: dict[str, tuple[int, ...]]  # by path
    read: Callable[[str], np.ndarray]  # path -> array, in the dtype of the file


def open_weights(path: str | os.PathLike, config: ModelConfig) -> Weights:
    """The backbone of any checkpoint (averaged weights if it has them), for a training of the model `config`.

    Raises:
        UserError: no checkpoint, a model of other fields (each is named), or parameters that its config does not describe.
    """
    if checkpoint.kind(path) == checkpoint.RELEASED:
        source = _Source(path)
        theirs, groups = source.released.model, _by_path(source.backbone_rows)
        read = lambda key: _stack(source.backbone, groups[key])  # noqa: E731
    else:
        config_there = checkpoint.saved_config(path)
        if "model" not in config_there:
            raise UserError(f"{path}: a checkpoint of a codec; expected one of the backbone")
        theirs = from_dict(ModelConfig, config_there["model"], where=f"{path}: config.model")
        groups = _by_path(backbone_table(theirs))
        _check_params(checkpoint.array_specs(path), groups, str(path))
        read = functools.partial(checkpoint.read_array, path)
    _check_same_model(path, theirs, config)
    return Weights(_shapes(groups), read)


# Fields of a model that may change between two trainings: how it computes and draws, not what its weights are of.
_MAY_CHANGE = ("dtype", "max_length", "dit_config.cfm_config", "lm_config.dim_model_base", "lm_config.bos_token_id",
               "lm_config.eos_token_id")  # fmt: skip
_MUP = ("lm_config.scale_emb", "lm_config.scale_depth")  # count with use_mup alone


def _check_same_model(path, theirs: ModelConfig, ours: ModelConfig) -> None:
    may_change = _MAY_CHANGE if theirs.lm_config.use_mup or ours.lm_config.use_mup else (*_MAY_CHANGE, *_MUP)
    pairs = zip(_flat(to_dict(theirs)).items(), _flat(to_dict(ours)).values(), strict=True)
    wrong = [
        f"model.{name} {_short(there)} there, {_short(here)} here"
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


def _short(value) -> str:
    return f"{value!r:.40}"


def _shapes(groups: Mapping[str, list[Row]]) -> dict[str, tuple[int, ...]]:
    return {path: group[0].shape if group[0].layer is None else (len(group), *group[0].shape) for path, group in groups.items()}


# What a MiniCPM-4 config.json must say, and what of it must equal the TSLM's; other fields do not concern the weights.
_TSLM_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "rms_norm_eps", "max_position_embeddings")  # fmt: skip
_TSLM_OPTIONAL = {"rope_theta": "rope_theta", "head_dim": "kv_channels"}
_TSLM_UNUSED = r"lm_head\.weight|.*\.rotary_emb\.inv_freq"  # the model has no text output; angles are computed


def load_tslm(path: str | os.PathLike, config: ModelConfig) -> Weights:
    """The text-semantic LM out of a MiniCPM-4 checkpoint as Hugging Face keeps it: every parameter under `base_lm/`.

    MiniCPM-4 multiplies its embeddings by `scale_emb` and its residual branches by `scale_depth / sqrt(layers)`. What of
    that the config's own scales do not do (without `use_mup` they are 1) is folded into the embedding and into the
    kernels o and down, so that the LM computes what it computed there.

    Args:
        path: directory with config.json and model.safetensors (or shards and their index), or such a file beside its
            config.json.
    Raises:
        UserError: a file is missing or unreadable, the LM has another shape or RoPE than the config's, or tensors differ
            from the table; each difference is named.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory; expected a MiniCPM-4 checkpoint")
    directory = path if path.is_dir() else path.parent
    theirs = _read_minicpm(directory / "config.json")
    ours = config.lm_config
    ours = dataclasses.replace(ours, kv_channels=config.tslm.head_dim)
    names = (*_TSLM_FIELDS, "rope_theta", "kv_channels", "rope_scaling")
    wrong = [
        f"{name} {_short(getattr(theirs, name))} there, model.lm_config has {_short(getattr(ours, name))}"
        for name in names
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if wrong:
        raise UserError(f"{directory / 'config.json'}: another LM than the config's: {'; '.join(wrong)}")

    tensors = _open(directory, BACKBONE_FILE, f"{BACKBONE_FILE}.index.json") if path.is_dir() else _open_safetensors(path)
    unused = sorted(name for name in tensors if re.fullmatch(_TSLM_UNUSED, name))
    if unused:
        print(f"{path}: not used: {', '.join(unused[:3])}{' ..' if unused[3:] else ''}", file=sys.stderr)
    rows = [
        row._replace(name=f"model.{row.name.removeprefix('base_lm.')}")
        for row in backbone_table(config)
        if row.name.startswith("base_lm.")
    ]
    differences = _differences({name: tensor for name, tensor in tensors.items() if name not in unused}, rows)
    if differences:
        raise UserError(f"{path}: {len(differences)} tensors differ from MiniCPM-4's: {'; '.join(differences)}")
    groups = _by_path(rows)
    residual = theirs.scale_depth / math.sqrt(theirs.num_hidden_layers) / config.tslm.residual_scale
    factors = {"base_lm/embed/embedding": theirs.scale_emb / config.embed_scale}
    factors |= {f"base_lm/layers/{name}/kernel": residual for name in ("o", "down")}

    def read(key):
        array = _stack(tensors, groups[key])
        return array.astype(np.float32) * np.float32(factors[key]) if factors.get(key, 1.0) != 1.0 else array

    return Weights(_shapes(groups), read)


def _read_minicpm(path: pathlib.Path) -> LMConfig:
    """What a MiniCPM-4 config.json says of the LM, in our words."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it says how a MiniCPM-4 scales its weights") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    needed = (*_TSLM_FIELDS, "scale_emb", "scale_depth")
    if missing := [name for name in needed if name not in content]:
        raise UserError(f"{path}: no {', '.join(missing)}; expected the config.json of a MiniCPM-4")
    fields = {name: content[name] for name in needed}
    fields |= {ours: content[name] for name, ours in _TSLM_OPTIONAL.items() if content.get(name) is not None}
    fields.setdefault("kv_channels", content["hidden_size"] // content["num_attention_heads"])
    rope = dict(content.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "longrope"))
    if kind != "longrope":
        raise UserError(f"{path}: rope_scaling of type {kind!r}; only longrope is supported")
    return from_dict(LMConfig, fields | {"rope_scaling": {"type": kind} | rope}, where=str(path))


# ---- writing -------------------------------------------------------------------------------------------------------


def save(
    directory: str | os.PathLike,
    config: ModelConfig,
    params: Mapping,
    vae_config: AudioVAEConfig,
    vae_params: Mapping,
    tokenizer: Tokenizer | str | os.PathLike,
    raw: Mapping | None = None,
) -> None:
    """Writes a directory that the reference loads; it appears whole or not at all.

    Args:
        directory: absent or empty.   params, vae_params: arrays of numpy or jax, kept in their dtype.
        tokenizer: one of ours, or the directory or file of one.   raw: imported config.json whose own keys are kept.
    Raises:
        UserError: the directory holds something, or parameters differ from the table (each is named).
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    with fresh_directory(directory) as aside:
        _write_json(aside / "config.json", to_released(config, vae_config, raw))
        _write_params(aside / BACKBONE_FILE, backbone_table(config), params)
        _write_params(aside / VAE_FILE, vae_table(vae_config), vae_params, _constants(vae_config))
        tokenizer.save(aside)


def _constants(config: AudioVAEConfig) -> dict[str, np.ndarray]:
    boundaries = config.sr_bin_boundaries
    return {} if boundaries is None else {_BOUNDARIES: np.array(boundaries, np.int32)}


def _write_params(
    path: pathlib.Path, rows: list[Row], params: Mapping, constants: Mapping[str, np.ndarray] | None = None
) -> None:
    groups, leaves, constants = _by_path(rows), checkpoint.flatten(params), constants or {}
    _check_params(leaves, groups, path.name)
    header = _header(groups, leaves) | {name: (array.dtype, array.shape) for name, array in constants.items()}
    write_safetensors(path, header, itertools.chain(constants.items(), _torch_tensors(groups, leaves.__getitem__)))


def _check_params(leaves: Mapping[str, Any], groups: Mapping[str, list[Row]], what: str) -> None:
    problems = [f"missing {path}" for path in groups.keys() - leaves.keys()]
    problems += [f"unexpected {path}" for path in leaves.keys() - groups.keys()]
    for path in groups.keys() & leaves.keys():
        first = groups[path][0]
        shape = first.shape if first.layer is None else (len(groups[path]), *first.shape)
        if tuple(leaves[path].shape) != shape:
            problems.append(f"{path} is {list(leaves[path].shape)}, expected {list(shape)}")
        if np.dtype(leaves[path].dtype) not in _NAMES:
            problems.append(f"{path} is {leaves[path].dtype}, expected one of {', '.join(d.name for d in _NAMES)}")
    if problems:
        raise UserError(f"{what}: {len(problems)} parameters do not fit the config: " + "; ".join(sorted(problems)))


def _header(groups, leaves: Mapping[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {row.name: (np.dtype(leaves[path].dtype), row.torch_shape) for path, group in groups.items() for row in group}


def _torch_tensors(groups, read: Callable[[str], Any]) -> Iterator[tuple[str, np.ndarray]]:
    for path, group in _progress(groups.items(), "writing tensors"):
        leaf = read(path)
        for row in group:
            yield row.name, row.to_torch(np.asarray(leaf if row.layer is None else leaf[row.layer]))
        del leaf  # before the next one is read


def write_safetensors(path, header: Mapping[str, tuple[np.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, np.ndarray]]):
    """Writes tensors as they come, in any order; what each will be is known beforehand.

    The format: length of the header (8 bytes, little-endian), the header in JSON, then the tensors' bytes. Wider dtypes
    come first, so that all are aligned; the bytes are those that the safetensors library writes.
    """
    order = sorted(header, key=lambda name: (list(_NAMES).index(header[name][0]), name))
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = header[name]
        end = offset + dtype.itemsize * math.prod(shape)
        content[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(content, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    missing = set(header)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors:
            assert (tensor.dtype, tensor.shape) == header[name], name
            file.seek(8 + len(encoded) + content[name]["data_offsets"][0])
            file.write(np.ascontiguousarray(tensor).view(np.uint8).data if tensor.size else b"")
            missing.remove(name)
            del tensor  # before the next one is read: it may be a view of all layers
        file.flush()
        os.fsync(file.fileno())
    assert not missing, missing


@contextlib.contextmanager
def fresh_directory(directory) -> Iterator[pathlib.Path]:
    """A fresh directory that becomes `directory` when the block ends, and vanishes when it fails.

    Raises:
        UserError: `directory` holds something already, or cannot be made.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: already there; choose a directory that is absent or empty")
    aside = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.incomplete")  # hosts that share a disk share pids
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None
    try:
        yield aside
        try:
            aside.replace(directory)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: pathlib.Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# ---- training workdirs ---------------------------------------------------------------------------------------------
#
#   WORKDIR/checkpoints/STEP/                  weights; its meta holds {"config": {"model": ..}}, imported ones "released"
#   WORKDIR/codec/audiovae.safetensors         the codec that made the latents, and its config.json
#   WORKDIR/tokenizer/                         the tokenizer that made the ids


def load_model(path: str | os.PathLike) -> Loaded:
    """Reads whatever a checkpoint argument names: a training workdir, one step of it, or a released directory.

    Raises:
        UserError: neither, or a workdir without codec/ or tokenizer/.
    """
    if checkpoint.kind(path) == checkpoint.RELEASED:
        return load(path)
    work = _Workdir(path)
    _, params, _ = checkpoint.load_params(path)
    _check_params(checkpoint.flatten(params), _by_path(backbone_table(work.config)), str(path))
    vae_params = checkpoint.nest(_assemble(work.vae, vae_table(work.vae_config)))
    return Loaded(work.config, params, work.vae_config, vae_params, work.raw, work.tokenizer_dir)


def import_torch(source: str | os.PathLike, workdir: str | os.PathLike) -> None:
    """Turns a released directory into a training workdir with one checkpoint, step 0, tensor by tensor.

    The stacked parameters are put together in mapped files, so that no more than a few tensors are ever in memory.
    """
    opened = _Source(source)
    tokenizer = load_tokenizer(source)
    groups = _by_path(opened.backbone_rows)
    config = {"model": to_dict(opened.released.model), "released": opened.released.raw}
    with fresh_directory(workdir) as aside:
        scratch = aside / "scratch"
        scratch.mkdir()
        arrays = {}
        for path, group in _progress(groups.items(), "reading tensors"):
            mapped = functools.partial(_mapped, scratch / path.replace("/", "."))
            arrays[path] = _stack(opened.backbone, group, mapped)
        with Console(stderr=True).status("writing the checkpoint"):
            checkpoint.save_arrays(aside, 0, arrays, {"config": config})
        del arrays
        shutil.rmtree(scratch)
        _write_json(aside / "config.json", config)
        save_codec(aside, opened.vae_config, checkpoint.nest(_assemble(opened.vae, opened.vae_rows)))
        tokenizer.save(aside / "tokenizer")


def export_torch(path: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Turns a training workdir, or one step of it, into a directory that the reference loads, tensor by tensor.

    A released directory may be given too: it comes out with one file of weights each for backbone and codec.

    Raises:
        UserError: no checkpoint, or its weights do not fit its config.
    """
    if checkpoint.kind(path) == checkpoint.RELEASED:
        opened = _Source(path)
        tokenizer = load_tokenizer(opened.directory)
        with fresh_directory(directory) as aside:
            _write_json(aside / "config.json", to_released(opened.released.model, opened.vae_config, opened.released.raw))
            _copy(opened.backbone, aside / BACKBONE_FILE)
            _copy(opened.vae, aside / VAE_FILE)
            tokenizer.save(aside)
        return
    work = _Workdir(path)
    tokenizer = load_tokenizer(work.tokenizer_dir)
    groups = _by_path(backbone_table(work.config))
    specs = checkpoint.array_specs(path)
    _check_params(specs, groups, str(path))
    with fresh_directory(directory) as aside:
        _write_json(aside / "config.json", to_released(work.config, work.vae_config, work.raw))
        read = functools.partial(checkpoint.read_array, path)
        write_safetensors(aside / BACKBONE_FILE, _header(groups, specs), _torch_tensors(groups, read))
        _copy(work.vae, aside / VAE_FILE)
        tokenizer.save(aside)


def _copy(tensors: Mapping[str, Stored], path: pathlib.Path) -> None:
    header = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    content = ((name, tensor.read()) for name, tensor in _progress(tensors.items(), f"writing {path.name}"))
    write_safetensors(path, header, content)


def save_codec(workdir: str | os.PathLike, config: AudioVAEConfig, vae_params: Mapping) -> None:
    """Writes WORKDIR/codec/."""
    with fresh_directory(pathlib.Path(workdir) / "codec") as aside:
        _write_json(aside / "config.json", to_dict(config))
        _write_params(aside / VAE_FILE, vae_table(config), vae_params, _constants(config))


def load_codec(path: str | os.PathLike) -> tuple[AudioVAEConfig, dict]:
    """The codec of whatever holds one: a workdir of train-vae, one of train, a step of either, shards, a released directory.

    Returns:
        vae_config, and vae_params as nested dicts of numpy arrays.
    Raises:
        UserError: none of these, or tensors differ from the table.
    """
    path = pathlib.Path(path).absolute()
    if (path / "codec").is_dir():
        return _read_codec(*_open_codec(path / "codec"))
    if checkpoint.kind(path) == checkpoint.RELEASED:
        config, tensors = read_released(path).vae, _open(path, VAE_FILE, "audiovae.pth")
        _refuse(path, _differences(tensors, vae_table(config)))
        return _read_codec(_with_boundaries(config, tensors), tensors)
    config = checkpoint.saved_config(path)
    if "vae" not in config:
        return _read_codec(*_open_codec(_root(path) / "codec"))
    vae_config = from_dict(AudioVAEConfig, config["vae"], where=f"{path}: config.vae")
    _, params, _ = checkpoint.load_params(path)
    _check_params(checkpoint.flatten(params), _by_path(vae_table(vae_config)), str(path))
    return vae_config, params


def codec_sha256(vae_params: Mapping, vae_config: AudioVAEConfig) -> str:
    """Identifies a codec: the hash of its configuration and of every parameter, by path."""
    digest = hashlib.sha256(json.dumps(to_dict(vae_config), sort_keys=True).encode())
    leaves = jax.tree_util.tree_leaves_with_path(vae_params)
    for path, leaf in sorted((jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def makers_sha256(path: str | os.PathLike) -> dict[str, str]:
    """What identifies the codec and the tokenizer of any checkpoint of the backbone, by the names that shards give them.

    A released tokenizer.json counts as `Tokenizer.save` writes it, for that is the one `prepare` keeps and hashes. A workdir
    without a checkpoint will do.
    """
    path = pathlib.Path(path).absolute()
    own = path / "tokenizer"
    if not own.is_dir():
        own = path if checkpoint.kind(path) == checkpoint.RELEASED else _root(path) / "tokenizer"
    vae_config, vae_params = load_codec(path)
    return {"codec_sha256": codec_sha256(vae_params, vae_config), "tokenizer_sha256": load_tokenizer(own).sha256}


def check_makers(path: str | os.PathLike, header, *, name: str = "", advice: str = "") -> None:
    """Refuses shards whose latents or ids mean something else than those that a checkpoint's weights were trained on.

    Args:
        path: as in `makers_sha256`.   header: of the shards.
        name: of the path in the message.   advice: what to do; by default, to prepare the shards with what the path holds.
    Raises:
        UserError: another codec or tokenizer, each with both hashes.
    """
    ours = makers_sha256(path)
    wrong = [part for part in ours if ours[part] != getattr(header, part)]
    if wrong:
        parts = [part.removesuffix("_sha256") for part in wrong]
        sums = [f"{part}: here {ours[full]:.12}, shards {getattr(header, full):.12}" for part, full in zip(parts, wrong)]
        advice = advice or f"prepare them with --vae={path} and --config.tokenizer set to its tokenizer"
        raise UserError(
            f"the shards were not made with the {' and '.join(parts)} of {name or path} ({'; '.join(sums)}, SHA-256): {advice}"
        )


def _open_codec(directory: pathlib.Path) -> tuple[AudioVAEConfig, dict[str, Stored]]:
    """A codec/ directory, checked, nothing read yet."""
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    config = from_dict(AudioVAEConfig, content, where=str(path))
    tensors = _open(directory, VAE_FILE)
    _refuse(directory, _differences(tensors, vae_table(config)))
    return config, tensors


def _read_codec(config: AudioVAEConfig, tensors: Mapping[str, Stored]) -> tuple[AudioVAEConfig, dict]:
    return config, checkpoint.nest(_assemble(tensors, vae_table(config)))


def _root(path: pathlib.Path) -> pathlib.Path:
    """The workdir of a workdir or of one of its steps."""
    return path if (path / "checkpoints").is_dir() else path.parent.parent


class _Workdir:
    """What a training workdir holds beside the weights."""

    def __init__(self, path):
        path = pathlib.Path(path).absolute()
        self.codec_dir, self.tokenizer_dir = _root(path) / "codec", _root(path) / "tokenizer"
        for directory in (self.codec_dir, self.tokenizer_dir):
            if not directory.is_dir():
                raise UserError(f"{directory}: no such directory; a workdir keeps its codec and tokenizer beside checkpoints/")
        config = checkpoint.saved_config(path)
        self.config = from_dict(ModelConfig, config.get("model", {}), where=f"{path}: config.model")
        self.raw = config.get("released")
        self.vae_config, self.vae = _open_codec(self.codec_dir)


def _mapped(path: pathlib.Path, shape, dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype=dtype, mode="w+", shape=shape))


def _progress(items: Sized, what: str):
    """Goes through `items` with a bar on a terminal."""
    console = Console(stderr=True)
    return track(items, what, console=console, disable=not console.is_terminal, transient=True)
