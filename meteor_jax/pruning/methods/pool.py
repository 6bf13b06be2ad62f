"""Control: each encoder's grid averaged down to fewer cells."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.method import Method, Reduction, ReductionContext, Span
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import FUSION
from meteor_jax.pruning.registry import preset, register
from meteor_jax.types import Array


@register("pool")
@dataclasses.dataclass(frozen=True)
class Pool(Method):
    """Averages cells of each encoder's grid, at most `keep` over all; a cell takes the place of its
    middle token. It needs whole grids."""

    stages = ("fuse",)

    def scores(self, x: Array, *, context: ReductionContext) -> Array:
        return jnp.zeros(x.shape[:2])  # nothing is chosen

    def select(self, x: Array, scores: Array, *, context: ReductionContext) -> Reduction:
        for span in context.spans:
            if span.size != span.grid**2:
                raise ValueError(
                    f"pool needs {span.encoder}'s whole {span.grid}×{span.grid} grid, but "
                    f"{span.size} tokens arrive; use it without steps inside the encoders."
                )
        pooled, middles = [], []
        sides = pooled_grids(context.keep, spans=context.spans)
        for span, side in zip(context.spans, sides, strict=True):
            weights = _cell_weights(span.grid, side)
            cells = span.of(x).reshape(-1, span.grid, span.grid, x.shape[-1])
            cells = jnp.einsum("pg,qh,ighd->ipqd", weights, weights, cells)
            pooled.append(cells.reshape(cells.shape[0], side * side, -1))
            middle = ((np.arange(side) + 0.5) * span.grid / side).astype(int)
            middles.append(span.start + (middle[:, None] * span.grid + middle).ravel())
        idx = jnp.asarray(np.concatenate(middles), jnp.int32)
        idx = jnp.broadcast_to(idx, (x.shape[0], idx.size))
        pooled = jnp.concatenate(pooled, axis=1).astype(x.dtype)
        return Reduction(x=pooled, idx=idx, valid=jnp.ones(idx.shape, bool))


def pooled_grids(keep: int, *, spans: tuple[Span, ...]) -> tuple[int, ...]:
    """Sides of the pooled grids: in proportion to the tokens, at most `keep` cells over all.

    Raises:
        ValueError: if `keep` has no cell for every encoder.
    """
    if keep < len(spans):
        raise ValueError(
            f"pool(keep={keep}) has less than a cell for each of {len(spans)} encoders; keep more."
        )
    total = sum(span.size for span in spans)
    sides = [int((keep * span.size / total) ** 0.5) or 1 for span in spans]
    while sum(side * side for side in sides) > keep:  # where small encoders were rounded up
        sides[sides.index(max(sides))] -= 1
    for i, span in enumerate(spans):
        larger = sides[i] + 1
        if larger <= span.grid and sum(s * s for s in sides) - sides[i] ** 2 + larger**2 <= keep:
            sides[i] = larger
    return tuple(sides)


def _cell_weights(grid: int, side: int) -> np.ndarray:
    """float32[side, grid]: each row averages the grid lines that its cell covers, by overlap."""
    edges = np.arange(side + 1) * grid / side
    lines = np.arange(grid)
    overlap = np.minimum(edges[1:, None], lines + 1) - np.maximum(edges[:-1, None], lines)
    overlap = np.maximum(overlap, 0)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


@preset
def pool(*, keep: int) -> PrunePlan:
    """Each encoder's grid averaged down to at most `keep` cells over all."""
    return PrunePlan("pool", (Step(FUSION, Pool(), Fixed(keep)),))
