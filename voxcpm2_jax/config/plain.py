"""Config dataclasses from plain data (JSON, ConfigDict) and back, with strict checks; UserError, the error they raise.

to_dict(config) -> nested dicts and lists            from_dict(cls, data) -> config, or a UserError that names the field
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A mistake of the user. The message is one line to show: what we got, what was expected, what to do."""


def check_at_least(least, config, where: str, *names: str) -> None:
    """Raises UserError unless each named field is None or at least `least`; `where` is the config's name in the message."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise UserError(f"{where}.{name} must be at least {least}, got {value}")


def to_dict(config) -> dict[str, Any]:
    """A dataclass as nested dicts and lists, as JSON would return it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls, data: Mapping[str, Any], *, where: str = "config", unknown: dict | None = None):
    """Builds dataclass `cls` from nested mappings and checks every key and type.

    Args:
        data: absent keys take the default of the dataclass.   where: name of `data` in messages.
        unknown: if given, unknown keys are collected here, nested as in `data`; otherwise they raise.
    Raises:
        UserError: an unknown or missing key, or a value of the wrong type; the message has its path.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected fields of {cls.__name__}, got {data!r}")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        if key not in names:
            if unknown is None:
                raise UserError(f"{where}.{key}: unknown key; {cls.__name__} has {', '.join(sorted(names))}")
            unknown[key] = value
            continue
        rest = None if unknown is None else {}
        values[key] = _coerce(hints[key], value, f"{where}.{key}", rest)
        if rest:
            unknown[key] = rest
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise UserError(f"{where}: no {', '.join(missing)}; {cls.__name__} needs it")
    return cls(**values)


def _coerce(hint, value, where, unknown):
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=where, unknown=unknown)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        (hint,) = [o for o in options if o is not type(None)]
        return _coerce(hint, value, where, unknown)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise UserError(f"{where}: expected a list, got {value!r}")
        args = typing.get_args(hint)
        items = list(value)
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise UserError(f"{where}: expected {len(args)} values, got {len(items)}")
        hints = args[:1] * len(items) if args[-1] is Ellipsis else args
        return tuple(_coerce(h, item, f"{where}[{i}]", unknown) for i, (h, item) in enumerate(zip(hints, items)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def short(value) -> str:
    """The first 40 characters of a value, for messages."""
    return f"{value!r:.40}"
