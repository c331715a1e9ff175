"""Reads `--config=FILE[:VARIANT] --config.a.b=value ...` into nested plain data.

FILE is a Python file with `get_config(variant)`, which returns an ml_collections ConfigDict (configs/ has ours). A command
turns the result into a frozen dataclass with `config.plain.from_dict`, which checks every value.
"""

import importlib.util
import inspect
import pathlib
from collections.abc import Mapping, Sequence

from voxcpm2_jax.config.plain import UserError


def load_config(argument: str, overrides: Sequence[str] = ()) -> dict:
    """The config that the flags name, as nested plain data.

    Args:
        argument: FILE[:VARIANT]. A relative FILE is looked for in the current directory, then beside the package.
        overrides: "--config.a.b=value"; the last one of a field wins. A value must have the type that the field has in FILE.
            Where FILE has None, every literal is accepted, and every field accepts None; `from_dict` checks these.
    Raises:
        UserError: no such file, variant or field, or a value of the wrong type.
    """
    if importlib.util.find_spec("ml_collections") is None:
        raise UserError(f"--config={argument}: configs need ml-collections, which is not installed: pip install ml-collections")
    from absl import flags
    from ml_collections import config_flags

    config = _get_config(argument)
    _make_settable(config)
    values = {}
    for override in overrides:
        name, has_value, value = override.removeprefix("--config.").partition("=")
        if not has_value:
            raise UserError(f"{override}: expected --config.{name}=VALUE")
        _check_key(config, name)
        values[name] = value
    nones = [name for name, value in values.items() if value == "None"]
    argv = ["voxcpm2-jax", *(f"--config.{name}={value}" for name, value in values.items() if name not in nones)]
    private = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=private, sys_argv=argv)
        private(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    with config.ignore_type(), config.unlocked():
        for name in nones:
            parent, _, last = name.rpartition(".")
            (config[parent] if parent else config)[last] = None
    return config.to_dict()


def _get_config(argument):
    from ml_collections import ConfigDict

    path, has_variant, variant = argument.partition(":")
    places = [pathlib.Path(path), pathlib.Path(__file__).parents[2] / path]
    found = [place for place in places if place.is_file()]
    if not found:
        raise UserError(f"--config={argument}: no such file; looked for {places[0]} and {places[1]}")
    spec = importlib.util.spec_from_file_location(f"{found[0].stem}_config", found[0])
    if spec is None:
        raise UserError(f"--config={argument}: expected a Python file with get_config(variant)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{found[0]}: not valid Python ({error})") from None
    except ImportError as error:
        raise UserError(f"{found[0]}: cannot be imported ({error})") from None
    variants = [variant] if has_variant else []
    try:
        inspect.signature(module.get_config).bind(*variants)
    except AttributeError:
        raise UserError(f"{found[0]}: has no get_config(variant)") from None
    except TypeError:
        raise UserError(f"--config={argument}: {'takes no' if variants else 'needs a'} variant") from None
    config = module.get_config(*variants)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{found[0]}: get_config returns {type(config).__name__}; expected an ml_collections.ConfigDict")
    return config


def _make_settable(config) -> None:
    """Replaces values for which ml_collections has no flag: None by a placeholder, lists by tuples."""
    from ml_collections import config_dict

    with config.unlocked(), config.ignore_type():
        for name, value in list(config.items()):
            if isinstance(value, config_dict.ConfigDict):
                _make_settable(value)
            elif value is None:
                config[name] = config_dict.placeholder(object)
            elif isinstance(value, list):
                del config[name]  # a tuple assigned to a field that holds a list becomes a list
                config[name] = tuple(value)


def _check_key(config, name) -> None:
    node, where = config, "config"
    for part in name.split("."):
        if not isinstance(node, Mapping) and not hasattr(node, "keys"):
            raise UserError(f"--config.{name}: {where} is a value and has no fields")
        if part not in node:
            raise UserError(f"--config.{name}: unknown key; {where} has {', '.join(sorted(node.keys()))}")
        node, where = node[part], f"{where}.{part}"
