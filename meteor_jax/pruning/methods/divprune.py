"""DivPrune (CVPR 2025, arXiv 2503.02175): keeps the tokens farthest from one another."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.method import Method, ReductionContext
from meteor_jax.pruning.ops.similarity import finite_tokens, unit_tokens
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import FUSION
from meteor_jax.pruning.registry import preset, register
from meteor_jax.types import Array

FARTHEST = 3.0  # more than any cosine distance


@register("divprune")
@dataclasses.dataclass(frozen=True)
class DivPrune(Method):
    """Chooses greedily, by the smallest cosine distance to what is chosen. Our reading: over the
    tokens of all encoders at once."""

    stages = ("fuse",)

    def scores(self, x: Array, *, context: ReductionContext) -> Array:
        return farthest_points(x, keep=context.keep)


def farthest_points(x: Array, *, keep: int) -> Array:
    """Greedy max-min cosine distance, as DivPrune chooses (CVPR 2025, arXiv 2503.02175).

    First comes the token whose nearest neighbour is farthest away, then always the one that is
    farthest from all that were chosen. Distances of all pairs are held: N² floats an example.

    Shapes:
        x: float[B, N, D].
        returns: float32[B, N]; `keep` for the first choice, one less for each after it, 0 for
            what is not chosen.
    """
    unit, finite = unit_tokens(x), finite_tokens(x)
    distance = 1 - jnp.einsum("bnd,bmd->bnm", unit, unit)
    num_tokens = x.shape[1]
    others = ~jnp.eye(num_tokens, dtype=bool) & finite[:, None]
    nearest = jnp.where(others, distance, jnp.inf).min(-1)
    first = jnp.where(finite, nearest, -jnp.inf).argmax(-1)
    place = jnp.arange(num_tokens)

    def choose(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        nearest, scores = state
        chosen = nearest.argmax(-1)[:, None]
        scores = jnp.where(place == chosen, keep - step, scores)
        distance_to_it = jnp.take_along_axis(distance, chosen[..., None], axis=1)[:, 0]
        nearest = jnp.minimum(nearest, distance_to_it)
        return jnp.where(place == chosen, -jnp.inf, nearest), scores

    # Nothing is chosen yet, so all are equally far from it, but for the one that comes first.
    nearest = jnp.where(place == first[:, None], jnp.inf, FARTHEST)
    nearest = jnp.where(finite, nearest, -jnp.inf)
    scores = jnp.zeros(nearest.shape, jnp.float32)
    return jax.lax.fori_loop(0, keep, choose, (nearest, scores))[1]


@preset
def divprune(*, keep: int) -> PrunePlan:
    """DivPrune: of the tokens that enter the decoder, those farthest from one another."""
    return PrunePlan("divprune", (Step(FUSION, DivPrune(), Fixed(keep)),))
