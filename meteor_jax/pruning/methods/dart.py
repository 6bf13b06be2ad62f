"""DART (EMNLP 2025, arXiv 2502.11494): the tokens least like a few pivots stay.

B rows, S entries of the packed sequence, P pivots.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.method import Method, ReductionContext, text_after_image
from meteor_jax.pruning.ops.select import Selection, keep_topk
from meteor_jax.pruning.ops.similarity import finite_tokens, rank, unit_tokens
from meteor_jax.pruning.plan import PrunePlan, decoder_steps
from meteor_jax.pruning.registry import preset, register
from meteor_jax.types import Array

MOST_SIMILAR = 3.0  # more than any cosine


@preset
def dart(*, layer: int = 2, keep: int, pivots: tuple[int, int] = (4, 4)) -> PrunePlan:
    """DART: before `layer`, the tokens least like a few pivots, visual and text, that have the
    largest keys one layer earlier; positions stay."""
    steps = decoder_steps((layer,), (keep,), method=Dart(pivots=pivots), budget=Fixed)
    return PrunePlan("dart", steps)


@register("dart")
@dataclasses.dataclass(frozen=True)
class Dart(Method):
    """Pivots are the visual tokens, and the tokens of the text after the image, whose keys have the
    largest L1 norm over all heads. Visual pivots stay; the rest of the budget is `unlike_pivots`,
    by the states that enter the layer after the step. Our reading: states are compared without the
    decoder's last norm, and pivots that get one token more than others are the first.

    Attributes:
        pivots: how many visual and how many text tokens of a row are pivots.
    """

    stages = ("decode",)
    needs = frozenset({"keys"})

    pivots: tuple[int, int] = (4, 4)

    def __post_init__(self) -> None:
        if min(self.pivots) < 0 or not sum(self.pivots):
            raise ValueError(f"pivots: expected one pivot at least, got {self.pivots}.")

    def scores(self, x: Array, *, context: ReductionContext) -> Array:
        """float32[B, S]: 1 for what stays, 0 for the rest."""
        sequence = context.sequence
        strength = jnp.abs(context.keys.astype(jnp.float32)).sum((-2, -1))
        is_visual = sequence.is_visual
        budget = jnp.minimum(context.keep * context.num_images, is_visual.sum(1))

        def strongest(group: Array, *, count: int, most: Array | None = None) -> Selection:
            keep = min(count, strength.shape[1])
            return keep_topk(strength, keep=keep, valid=group, num_keep=most)

        visual = strongest(is_visual, count=self.pivots[0], most=budget)
        text = strongest(text_after_image(sequence), count=self.pivots[1])
        is_pivot = jax.vmap(lambda row, idx, valid: row.at[idx].max(valid))(
            jnp.zeros_like(is_visual), visual.idx, visual.valid
        )
        taken = unlike_pivots(
            x,
            pivots=jnp.concatenate([visual.idx, text.idx], axis=1),
            pivot_valid=jnp.concatenate([visual.valid, text.valid], axis=1),
            candidates=is_visual & ~is_pivot,
            num_keep=budget - visual.valid.sum(1),
        )
        return (is_pivot | taken).astype(jnp.float32)


def unlike_pivots(
    x: Array, *, pivots: Array, pivot_valid: Array, candidates: Array, num_keep: Array
) -> Array:
    """The candidates that are least like some pivots, as DART chooses (EMNLP 2025).

    Each pivot, one after the other, takes an equal share of those not taken yet, the least
    similar by cosine; the first pivots take one more where the shares do not come out even.

    Shapes:
        x: float[B, N, D]; pivots: int32[B, P], places in x; pivot_valid: bool[B, P].
        candidates: bool[B, N]; num_keep: int32[B].
        returns: bool[B, N].
    """
    unit = unit_tokens(x)
    chosen = jnp.take_along_axis(unit, pivots[..., None], axis=1)
    similarity = jnp.einsum("bpd,bnd->bpn", chosen, unit)
    similarity = jnp.where(finite_tokens(x)[:, None], similarity, MOST_SIMILAR)  # taken last
    count = jnp.maximum(pivot_valid.sum(1, keepdims=True), 1)
    order = jnp.cumsum(pivot_valid, axis=1) - 1
    shares = num_keep[:, None] // count + (order < num_keep[:, None] % count)
    shares = jnp.where(pivot_valid, shares, 0)

    def take(taken: Array, pivot: tuple[Array, Array]) -> tuple[Array, None]:
        similarity, share = pivot
        free = candidates & ~taken
        order = rank(jnp.where(free, similarity, jnp.inf))
        return taken | (free & (order < share[:, None])), None

    taken, _ = jax.lax.scan(take, jnp.zeros_like(candidates), (similarity.swapaxes(0, 1), shares.T))
    return taken
