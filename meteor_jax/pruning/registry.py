"""Methods and presets by name. Every file in `pruning/methods/` is found by itself; code elsewhere
registers with the same decorators, once it is imported (by a config file, for example).

    @register("norm")
    @dataclasses.dataclass(frozen=True)
    class Norm(Method):
        def scores(self, x, *, context):
            return jnp.linalg.norm(x, axis=-1)

    @preset
    def norm(*, keep: int) -> PrunePlan:
        return PrunePlan("norm", (Step("fusion", Norm(), Fixed(keep)),))
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

from meteor_jax.config import ConfigError, suggest
from meteor_jax.pruning.method import Method

_METHODS: dict[str, type[Method]] = {}
_PRESETS: dict[str, Callable[..., Any]] = {}

M = TypeVar("M", bound=type[Method])
F = TypeVar("F", bound=FunctionType)


def register(name: str) -> Callable[[M], M]:
    """Class decorator: the options dataclass of the method called `name`.

    Raises:
        ValueError: if another method has that name.
    """

    def add(cls: M) -> M:
        known = _METHODS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(f"a method '{name}' is registered already, by {known.__module__}.")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def preset(function: F) -> F:
    """Function decorator: plan texts call it by its name, with keyword arguments."""
    _PRESETS[function.__name__] = function
    return function


def methods() -> dict[str, type[Method]]:
    """Every registered method by name."""
    _load()
    return dict(_METHODS)


def presets() -> dict[str, Callable[..., Any]]:
    """Every registered preset by name: a function of keyword arguments that makes a plan."""
    _load()
    return dict(_PRESETS)


def method_class(name: str) -> type[Method]:
    """Raises ConfigError, with the nearest name, for a method that nobody registered."""
    found = methods()
    if name not in found:
        raise ConfigError(f"no pruning method '{name}'.{suggest(name, found)}")
    return found[name]


@functools.cache
def _load() -> None:
    package = importlib.import_module("meteor_jax.pruning.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
