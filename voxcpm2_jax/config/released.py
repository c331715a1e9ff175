"""The released config.json: read into ModelConfig and AudioVAEConfig, and written from them.

Keys that this package does not know are kept beside the config and written again on export. A file that was read and
written without a change is the same JSON, down to the order of its keys and the spelling of its values.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from voxcpm2_jax.config.model import DTYPE_ALIASES, AudioVAEConfig, ModelConfig
from voxcpm2_jax.config.plain import UserError, from_dict, to_dict


@dataclass(frozen=True)
class Released:
    """A released config.json: the configs, and the file itself for export."""

    model: ModelConfig
    vae: AudioVAEConfig
    raw: dict[str, Any] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()  # paths of unknown keys


# Keys of the file that are not fields of ModelConfig.
_OTHER_KEYS = ("architecture", "device", "audio_vae_config")


def read_released(path: str | pathlib.Path) -> Released:
    """Reads a released `config.json` (or the directory that holds it).

    Raises:
        UserError: no such file, not JSON, another architecture, an impossible value.
    """
    path = pathlib.Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a released VoxCPM2 directory with config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("architecture", "voxcpm").lower() != "voxcpm2":
        got = raw.get("architecture", "none") if isinstance(raw, dict) else "no object"
        raise UserError(f'{path}: expected "architecture": "voxcpm2", got {got!r}')
    unknown: dict[str, Any] = {}
    model_part = {k: v for k, v in raw.items() if k not in _OTHER_KEYS}
    model = from_dict(ModelConfig, model_part, where=str(path), unknown=unknown)
    vae_unknown: dict[str, Any] = {}
    vae = from_dict(AudioVAEConfig, raw.get("audio_vae_config") or {}, where=f"{path}.audio_vae_config", unknown=vae_unknown)
    if vae_unknown:
        unknown["audio_vae_config"] = vae_unknown
    if vae.latent_dim != model.feat_dim:
        raise UserError(f"{path}: feat_dim {model.feat_dim} differs from audio_vae_config.latent_dim {vae.latent_dim}")
    return Released(model, vae, raw, tuple(_paths(unknown)))


def to_released(model: ModelConfig, vae: AudioVAEConfig, raw: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Content of the released file for this model.

    Args:
        raw: an imported file, whose keys and their order are kept. A field that is absent from it and has its default value
            stays absent, so that an unchanged import returns `raw`.
    """
    ours = to_dict(model) | {"audio_vae_config": to_dict(vae)}
    if raw is None:
        return {"architecture": "voxcpm2"} | ours | {"device": "cuda"}
    defaults = {f.name: _default(f) for f in dataclasses.fields(ModelConfig)} | {"audio_vae_config": to_dict(AudioVAEConfig())}
    return _merge(raw, ours, defaults)


def _default(field_):
    return to_dict(field_.default) if dataclasses.is_dataclass(field_.default) else field_.default


def _merge(raw, ours, defaults):
    """`raw` with the values of `ours`; keys that it lacks are added only if their value is not the default."""
    merged = dict(raw)
    for key, value in ours.items():
        old = raw.get(key)
        if isinstance(value, dict):
            nested = _merge(old or {}, value, defaults.get(key, {}))
            if nested or key in raw:
                merged[key] = nested if old is not None or nested else old
        elif key in raw:
            merged[key] = old if _same_value(old, value) else value
        elif value != defaults.get(key):
            merged[key] = value
    return merged


def _same_value(old, value) -> bool:
    """Whether the file's value means `value`; a dtype may have a short name in the file."""
    return old == value or (isinstance(old, str) and DTYPE_ALIASES.get(old) == value)


def _paths(tree, prefix=""):
    """Dotted paths of the leaves of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
