"""Which hardware a program is traced for: the one in use, unless it is compiled ahead of time."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator

import jax

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def target_platform() -> str:
    """What `compiling_for` says, else the kind of the mesh in force, which need not be this
    machine's, else JAX's default backend: "cpu", "gpu" or "tpu".

    Models ask this when they are traced, to choose between forms of one computation. A function
    that `jax.jit` has traced keeps the forms that it was traced with.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return _TARGET.get() or (device.platform if device else jax.default_backend())


@contextlib.contextmanager
def compiling_for(platform: str) -> Generator[None]:
    """Models traced in this context take the forms that are fast on `platform`."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)
