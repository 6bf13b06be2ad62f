"""Floating-point operations of a program, counted in its trace: the one counter of cost.

    flops, shapes = trace_flops(model.apply, params, images)    # of arrays or their shapes
    flops.total                                                 # all operations
    flops.grouped(lambda scope: scope.split("/")[0])            # by module

Counted: matrix products and convolutions, 2 operations a multiply-add, over every entry that the
program computes, padding included. Attention counts over all pairs of queries and keys: kernels
that skip what causality hides do up to half of it. Nothing is computed or compiled.

Each operation has a scope, the names of the modules (and `jax.named_scope`s) around it, joined by
"/". Scopes that models set on purpose: "scores" (what pruning computes in order to choose, merge
or pool tokens), "resize" (of pixels, position embeddings and grids), "prune_<i>" (pruning step i of
the decoder and the layers after it) and "entries_<n>" (the branch of an adaptive budget that runs
over n entries in total). JAX sets "rematted_computation".
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh

from meteor_jax.models.layers.attention import attention_kernel
from meteor_jax.models.layers.platform import compiling_for


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of a program or of a branch of one.

    Attributes:
        by_scope: operations outside of conditionals.
        conditionals: of each `lax.cond` or `lax.switch`, in order, its branches.
    """

    by_scope: Mapping[str, float]
    conditionals: tuple[tuple[Flops, ...], ...] = ()

    @property
    def total(self) -> float:
        """All operations; of a conditional the largest branch."""
        return sum(self.grouped(lambda scope: "").values())

    @property
    def needed(self) -> float:
        """All operations but those that rematerialisation computes again: the numerator of MFU
        (Chowdhery et al. 2022, PaLM, appendix B)."""
        return self.grouped(lambda scope: "again" if REMAT in scope else "")[""]

    @property
    def scopes(self) -> Iterator[str]:
        """Every scope, those in branches too."""
        yield from self.by_scope
        for branches in self.conditionals:
            for branch in branches:
                yield from branch.scopes

    def grouped(
        self,
        name: Callable[[str], str],
        *,
        weights: Mapping[int, Sequence[float]] | None = None,
    ) -> dict[str, float]:
        """Operations by `name(scope)`.

        Args:
            weights: by number of a conditional, how often each of its branches runs; of the others
                the largest counts.
        """
        groups: dict[str, float] = defaultdict(float)
        for scope, count in self.by_scope.items():
            groups[name(scope)] += count
        for i, branches in enumerate(self.conditionals):
            if weights and i in weights:
                shares = weights[i]
            else:
                largest = max(branches, key=lambda branch: branch.total)
                shares = [float(branch is largest) for branch in branches]
            for branch, share in zip(branches, shares, strict=True):
                for group, count in branch.grouped(name).items():
                    groups[group] += share * count
        return groups


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations by part for one prompt, and how many visual tokens its largest part saw.

    Attributes:
        rows: (part, operations).
        visual_tokens_fused: tokens of its images that enter the language model.
        visual_tokens_mean: tokens of its images in there, mean over its layers.
    """

    rows: tuple[tuple[str, float], ...]
    visual_tokens_fused: float = 0.0
    visual_tokens_mean: float = 0.0

    @property
    def total_flops(self) -> float:
        return sum(flops for _, flops in self.rows)


def trace_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Flops, Any]:
    """Counts the program that `function` traces to; returns the shapes of its results as well.

    Loops count each iteration, except `while_loop`, of which one counts. What no result needs does
    not count, because XLA leaves it out. Custom kernels are not seen: trace in `counted_forms`.
    What `jax.jit` has traced before keeps its forms.

    Args:
        args, kwargs: arrays, or `jax.ShapeDtypeStruct`s.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
    jaxpr, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return count_jaxpr(jaxpr), shapes


@contextlib.contextmanager
def counted_forms() -> Generator[None]:
    """Models traced in this context take the forms whose operations the trace shows: XLA's
    attention over all pairs, convolutions as convolutions, all rows on one device whatever mesh is
    in force."""
    no_mesh = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
    with attention_kernel("xla"), compiling_for("gpu"), no_mesh:
        yield


def count_jaxpr(jaxpr: core.Jaxpr, *, scope: str = "", times: float = 1.0) -> Flops:
    """Operations of `times` runs of `jaxpr`, inside of `scope`."""
    by_scope: dict[str, float] = defaultdict(float)
    conditionals: list[tuple[Flops, ...]] = []
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        here = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        if name in _COUNTED:
            by_scope[here] += times * _COUNTED[name](equation)
        elif name == "cond":
            branches = [
                count_jaxpr(branch.jaxpr, scope=here, times=times) for branch in params["branches"]
            ]
            if any(branch.total for branch in branches):
                conditionals.append(tuple(branches))
        else:
            repeats = params["length"] if name == "scan" else 1
            if name == "shard_map":  # whose inner shapes are one shard's
                axes = params.get("newly_manual_axes") or params["manual_axes"]  # jax 0.10.1
                repeats = math.prod(params["mesh"].shape[axis] for axis in axes)
            for inner in _inner_jaxprs(params):
                counted = count_jaxpr(inner, scope=here, times=times * repeats)
                for path, count in counted.by_scope.items():
                    by_scope[path] += count
                conditionals += counted.conditionals
    return Flops(by_scope, tuple(conditionals))


def _product(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = _shape(equation.invars[0])
    outputs = math.prod(_shape(equation.outvars[0]))
    return 2.0 * outputs * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> float:
    kernel = _shape(equation.invars[1])
    out_features = equation.params["dimension_numbers"].rhs_spec[0]
    taps = math.prod(kernel) / kernel[out_features]
    return 2.0 * math.prod(_shape(equation.outvars[0])) * taps


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


REMAT = "rematted_computation"  # JAX's name for it in a backward pass
_COUNTED = {"dot_general": _product, "conv_general_dilated": _convolution}


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The programs inside an equation: of calls, loops, rematerialisation, custom rules."""
    for value in params.values():
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
