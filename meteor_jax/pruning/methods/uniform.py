"""Control: every n-th token."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.method import Method, ReductionContext
from meteor_jax.pruning.ops.windows import window_quotas
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import FUSION
from meteor_jax.pruning.registry import preset, register
from meteor_jax.types import Array


@register("uniform")
@dataclasses.dataclass(frozen=True)
class Uniform(Method):
    """The middles of as many equal runs of tokens as are kept, window by window; in the decoder
    equal strides among the visual tokens that are still there."""

    def scores(self, x: Array, *, context: ReductionContext) -> Array:
        if context.sequence is not None:
            return _strides(context)
        sizes = context.window_sizes or (x.shape[1],)
        quotas = window_quotas(context.keep, sizes)
        starts = np.cumsum(sizes) - sizes
        places = np.concatenate(
            [
                start + (2 * np.arange(quota) + 1) * size // (2 * quota)
                for start, size, quota in zip(starts, sizes, quotas, strict=True)
            ]
        )
        return jnp.broadcast_to(jnp.zeros(x.shape[1]).at[places].set(1.0), x.shape[:2])


def _strides(context: ReductionContext) -> Array:
    is_visual = context.sequence.is_visual
    rank = jnp.cumsum(is_visual, axis=1) - 1
    remaining = jnp.maximum(is_visual.sum(1, keepdims=True), 1)
    keep = context.keep * context.num_images[:, None]
    chosen = (rank + 1) * keep // remaining > rank * keep // remaining
    return chosen.astype(jnp.float32)


@preset
def uniform(*, keep: int) -> PrunePlan:
    """Every n-th token at fusion."""
    return PrunePlan("uniform", (Step(FUSION, Uniform(), Fixed(keep)),))
