"""The tokens least like the mean token stay (METEOR, arXiv 2507.20842, shallow segment)."""

from __future__ import annotations

import dataclasses

from meteor_jax.pruning.method import Method, ReductionContext
from meteor_jax.pruning.ops.similarity import mean_token_similarity
from meteor_jax.pruning.registry import register
from meteor_jax.types import Array


@register("mean_token")
@dataclasses.dataclass(frozen=True)
class MeanToken(Method):
    """Drops the tokens most like the mean of their image's tokens: background, mostly."""

    stages = ("encode", "fuse")

    def scores(self, x: Array, *, context: ReductionContext) -> Array:
        return -mean_token_similarity(x)
