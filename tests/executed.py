"""Operations that a traced program really executes on given values: of a conditional, those of the
branch that is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from meteor_jax.models.flops import count_jaxpr


def count_executed(function: Callable[..., Any], *args: Any) -> float:
    """Operations of this run. Conditionals inside loops or calls count by the largest branch."""
    closed = jax.make_jaxpr(function)(*args)
    conditionals = [eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "cond"]
    taken = _values_of([eqn.invars[0] for eqn in conditionals], closed, jax.tree.leaves(args))
    total = count_jaxpr(closed.jaxpr).total
    for equation, index in zip(conditionals, taken, strict=True):
        costs = [count_jaxpr(branch.jaxpr).total for branch in equation.params["branches"]]
        total += costs[int(index)] - max(costs)
    return total


def _values_of(atoms: list[Any], closed: core.ClosedJaxpr, args: list[Any]) -> list[Any]:
    if not atoms:
        return []
    jaxpr = closed.jaxpr.replace(
        outvars=atoms, debug_info=closed.jaxpr.debug_info.with_unknown_names()
    )
    return jax.jit(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, closed.consts)))(*args)
