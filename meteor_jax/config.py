"""From the nested mapping of a config file to the frozen dataclasses that modules take."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A field that does not exist, or a value of the wrong type. The message is one line."""


def build(cls: type[T], values: Mapping[str, Any], *, where: str = "config") -> T:
    """Makes the dataclass `cls` from `values`, nested dataclasses included.

    A class with a `class_for` method chooses which dataclass the values are for, by one of them.

    Raises:
        ConfigError: naming the field, what was expected and, for an unknown field, the nearest
            valid name.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected fields by name, got {values!r:.60}.")
    choose = getattr(cls, "class_for", None)
    target: Any = cls if choose is None else choose(values, where=where)
    hints = typing.get_type_hints(target)
    names = [field.name for field in dataclasses.fields(target)]
    built = {}
    for name, value in values.items():
        if name not in names:
            raise ConfigError(f"{where}.{name}: no such field.{suggest(name, names)}")
        built[name] = convert(hints[name], value, f"{where}.{name}")
    required = [
        field.name
        for field in dataclasses.fields(target)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in built]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}.")
    try:
        return target(**built)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())


def suggest(name: str, valid: typing.Iterable[str]) -> str:
    """' Did you mean …?' with the nearest of `valid`, or the list of them."""
    valid = sorted(set(valid))
    near = difflib.get_close_matches(name, valid, n=1)
    return f" Did you mean '{near[0]}'?" if near else f" Valid: {', '.join(valid)}."


def convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [arg for arg in args if arg is not type(None)]
        if isinstance(value, Mapping):  # meant for the one that has fields, which says what is off
            options = [arg for arg in options if dataclasses.is_dataclass(arg)] or options
        for option in options[:-1]:
            try:
                return convert(option, value, where)
            except ConfigError:
                continue
        return convert(options[-1], value, where)
    if origin is typing.Literal:
        if value not in args:
            valid = ", ".join(map(str, args))
            raise ConfigError(f"{where}: expected one of {valid}, got {value!r}.")
        return value
    if dataclasses.is_dataclass(hint) or hasattr(hint, "class_for"):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected fields of {hint.__name__}, got {value!r}.")
        return build(hint, value, where=where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}.")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(args) != len(value):
            raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}.")
        pairs = enumerate(zip(args, value, strict=True))
        return tuple(convert(arg, item, f"{where}[{i}]") for i, (arg, item) in pairs)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}.")
        return {key: convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(
            f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})."
        )
    return value
