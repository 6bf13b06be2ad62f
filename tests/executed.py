"""Operations that a traced program really executes on given values: of a conditional, those of the
branch that is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from meteor_jax.models.cost import count_traced


def count_executed(function: Callable[..., Any], *args: Any) -> float:
    """As `count_traced`, but of this run. Branches inside loops count by the largest."""
    closed = jax.make_jaxpr(function)(*args)
    return _execute(closed, jax.tree.leaves(args))[0]


def _execute(closed: core.ClosedJaxpr, args: Sequence[Any]) -> tuple[float, list[Any]]:
    jaxpr, total = closed.jaxpr, 0.0
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name == "cond":
            branch = params["branches"][int(inputs[0])]
            count, outputs = _execute(branch, inputs[1:])
        elif name in ("jit", "pjit"):
            count, outputs = _execute(params["jaxpr"], inputs)
        else:
            names = [atom for atom in equation.invars if not isinstance(atom, core.Literal)]
            alone = jaxpr.replace(
                constvars=[], invars=names, outvars=equation.outvars, eqns=[equation],
                debug_info=jaxpr.debug_info.with_unknown_names(),
            )
            run = jax.jit(core.jaxpr_as_fun(core.ClosedJaxpr(alone, [])))
            known = [values[atom] for atom in names]
            count, outputs = count_traced(run, *known), run(*known)
        total += count
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return total, [read(atom) for atom in jaxpr.outvars]
