"""Reading traced programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import core


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a traced program, those inside loops, calls and branches too."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
        ):
            if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
                yield from equations(value)


def count_primitives(jaxpr: Any, *names: str) -> int:
    """How many of a traced program's equations are of these primitives, a loop's body once."""
    return sum(equation.primitive.name in names for equation in equations(jaxpr))


def saved_bytes(function: Any, *args: Any) -> int:
    """Bytes that a function's forward pass saves for the backward pass, its arguments included."""
    backward = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def differentiates_forward(function: Any, *args: Any) -> bool:
    """Whether `jax.jvp` can be compiled; what it raises of a custom VJP is a TypeError."""
    try:
        jax.jit(lambda *args: jax.jvp(function, args, args)).lower(*args)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        return False
    return True
