"""Control: each encoder drops its own redundant tokens, without looking at the others."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.method import Method, Reduction, ReductionContext, gather
from meteor_jax.pruning.ops.allocate import allocate
from meteor_jax.pruning.ops.select import Selection, keep_topk
from meteor_jax.pruning.ops.similarity import mean_token_similarity
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import FUSION
from meteor_jax.pruning.registry import preset, register
from meteor_jax.types import Array


@register("independent")
@dataclasses.dataclass(frozen=True)
class Independent(Method):
    """Of every encoder's tokens, by how many it has, those least like its own mean token stay."""

    stages = ("fuse",)

    def scores(self, x: Array, *, context: ReductionContext) -> Array:
        parts = [-mean_token_similarity(span.of(x)) for span in context.spans]
        return jnp.concatenate(parts, axis=1)

    def select(self, x: Array, scores: Array, *, context: ReductionContext) -> Reduction:
        sizes = {span.encoder: span.size for span in context.spans}
        shares = allocate(context.keep, ranks={}, available=sizes, assignment="tokens")
        kept = [
            span.start + keep_topk(span.of(scores), keep=shares[span.encoder]).idx
            for span in context.spans
        ]
        idx = jnp.concatenate(kept, axis=1)
        return gather(x, Selection(idx=idx, valid=jnp.ones(idx.shape, bool)))


@preset
def independent(*, keep: int) -> PrunePlan:
    """Each encoder drops its own redundant tokens, without looking at the others."""
    return PrunePlan("independent", (Step(FUSION, Independent(), Fixed(keep)),))
