"""The text-semantic LM from a MiniCPM-4 checkpoint in Hugging Face's layout, to start a training from."""

import dataclasses
import json
import math
import os
import pathlib
import re
import sys

import numpy as np

from voxcpm2_jax.checkpoint.arrays import Weights
from voxcpm2_jax.config.model import LMConfig, ModelConfig
from voxcpm2_jax.config.plain import UserError, from_dict, short
from voxcpm2_jax.torch_io.files import BACKBONE_FILE, find_differences, open_safetensors, open_tensors, stack_layers
from voxcpm2_jax.torch_io.tables import backbone_table, by_path, param_shapes

# Fields that a MiniCPM-4 config.json must have and that must equal the TSLM's. Other fields do not concern the weights.
_TSLM_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "rms_norm_eps", "max_position_embeddings")  # fmt: skip
_TSLM_OPTIONAL = {"rope_theta": "rope_theta", "head_dim": "kv_channels"}
_TSLM_UNUSED = r"lm_head\.weight|.*\.rotary_emb\.inv_freq"  # text output, which VoxCPM2 lacks; RoPE angles, which are computed


def load_tslm(path: str | os.PathLike, config: ModelConfig) -> Weights:
    """Opens the LM of a MiniCPM-4 checkpoint; its parameters are those under `base_lm/`.

    MiniCPM-4 multiplies its embeddings by `scale_emb` and its residual branches by `scale_depth / sqrt(layers)`. The model of
    `config` has scales of its own (1 without `use_mup`). The quotient of the two is multiplied into the embedding and into
    the kernels o and down, so that the LM computes what MiniCPM-4 computes.

    Args:
        path: directory with config.json and model.safetensors (or several files and their index), or one safetensors file
            with a config.json beside it.
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
        f"{name} {short(getattr(theirs, name))} there, model.lm_config has {short(getattr(ours, name))}"
        for name in names
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if wrong:
        raise UserError(f"{directory / 'config.json'}: another LM than the config's: {'; '.join(wrong)}")

    tensors = open_tensors(directory, BACKBONE_FILE, f"{BACKBONE_FILE}.index.json") if path.is_dir() else open_safetensors(path)
    unused = sorted(name for name in tensors if re.fullmatch(_TSLM_UNUSED, name))
    if unused:
        print(f"{path}: not used: {', '.join(unused[:3])}{' ..' if unused[3:] else ''}", file=sys.stderr)
    rows = [
        row._replace(name=f"model.{row.name.removeprefix('base_lm.')}")
        for row in backbone_table(config)
        if row.name.startswith("base_lm.")
    ]
    differences = find_differences({name: tensor for name, tensor in tensors.items() if name not in unused}, rows)
    if differences:
        raise UserError(f"{path}: {len(differences)} tensors differ from MiniCPM-4's: {'; '.join(differences)}")
    groups = by_path(rows)
    residual = theirs.scale_depth / math.sqrt(theirs.num_hidden_layers) / config.tslm.residual_scale
    factors = {"base_lm/embed/embedding": theirs.scale_emb / config.embed_scale}
    factors |= {f"base_lm/layers/{name}/kernel": residual for name in ("o", "down")}

    def read(key):
        array = stack_layers(tensors, groups[key])
        return array.astype(np.float32) * np.float32(factors[key]) if factors.get(key, 1.0) != 1.0 else array

    return Weights(param_shapes(groups), read)


def _read_minicpm(path: pathlib.Path) -> LMConfig:
    """A MiniCPM-4 config.json as LMConfig."""
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
