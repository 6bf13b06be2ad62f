"""SparseVLM (ICML 2025, arXiv 2410.04417): several steps in the decoder, by the attention of the
text that the image speaks of; the best of what is dropped is averaged into a few tokens.

B rows, T text tokens, S entries of the packed sequence.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.method import Reduction, ReductionContext, text_after_image
from meteor_jax.pruning.methods.text_attention import TextAttention
from meteor_jax.pruning.ops.merge import density_peaks, mean_of_clusters
from meteor_jax.pruning.ops.select import finite_scores, keep_topk
from meteor_jax.pruning.ops.similarity import rank
from meteor_jax.pruning.plan import PrunePlan, decoder_steps
from meteor_jax.pruning.registry import preset, register
from meteor_jax.types import Array, Sequence


@preset
def sparsevlm(*, layers: tuple[int, ...], keep: tuple[int, ...], recycle: float = 0.3) -> PrunePlan:
    """SparseVLM. Its layers 2, 6 and 15 of 32, after which it drops tokens, are our 3, 7 and 16.

    Our reading: budgets are fixed, as in its public code, where the paper adapts them to the rank
    of the attention; the averages count among `keep`, where that code adds them; and they stand
    where their centres stood, not behind all others.
    """
    method = SparseVLM(recycle=recycle)
    steps = decoder_steps(layers, keep, method=method, budget=Fixed, positions="contiguous")
    return PrunePlan("sparsevlm", steps)


@register("sparsevlm")
@dataclasses.dataclass(frozen=True)
class SparseVLM(TextAttention):
    """`TextAttention` of its raters, and recycling. `queries` is not used.

    Attributes:
        recycle: share of a step's dropped tokens, the best of them, that are averaged into a tenth
            as many, which count among `keep`; needs a fixed budget.
    """

    heads: int = 0
    recycle: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.recycle <= 1:
            raise ValueError(f"recycle: expected a share from 0 to 1, got {self.recycle}.")

    def begin(self, *, context: ReductionContext) -> Array:
        return text_query_mask(context.sequence, num_text=context.num_text)

    def query_weights(self, *, context: ReductionContext) -> Array:
        sequence = context.sequence
        chosen = jnp.take_along_axis(context.state, sequence.text_index, axis=1)
        return (chosen & sequence.is_text).astype(jnp.float32)

    def max_queries(self, num_text: int) -> int:
        return num_text

    def select(self, x: Array, scores: Array, *, context: ReductionContext) -> Reduction:
        recycled, clusters = self.recycling(keep=context.keep, available=context.available)
        if clusters:
            x, scores = recycle_dropped(
                x, scores, recycled=recycled, clusters=clusters, context=context
            )
        return super().select(x, scores, context=context)

    def recycling(self, *, keep: int, available: int) -> tuple[int, int]:
        """(tokens of an image that are recycled, tokens that they become), as SparseVLM counts
        them; `available` tokens reach the step.

        Raises:
            ValueError: if what they become would fill the whole budget.
        """
        dropped = available - keep
        if not self.recycle or dropped <= 0:
            return 0, 0
        recycled = int(self.recycle * dropped) + 1
        clusters = recycled // 10 + 1
        if clusters >= keep:
            raise ValueError(
                f"decode.recycle={self.recycle} makes {clusters} tokens of {dropped} dropped ones, "
                f"but decode.keep={keep}; keep more or recycle fewer."
            )
        return recycled, clusters


def text_query_mask(sequence: Sequence, *, num_text: int) -> Array:
    """SparseVLM's raters (ICML 2025, arXiv 2410.04417): the text that the image speaks of.

    Every visual token shares itself among the text after the image, by a softmax over inner
    products at the decoder's input; raters get the mean share or more (SparseVLM: more, which
    leaves none where all get the same).

    Shapes:
        returns: bool[B, T], by place in the row of text tokens; `num_text` = T.
    """
    after = text_after_image(sequence)
    rows = keep_topk(after, keep=min(num_text, after.shape[1]), valid=after)
    x = jax.lax.stop_gradient(sequence.x)
    text = jnp.take_along_axis(x, rows.idx[..., None], axis=1)
    inner = jnp.einsum("bsd,btd->bst", x, text, preferred_element_type=jnp.float32)
    share = jax.nn.softmax(jnp.where(rows.valid[:, None], inner, -jnp.inf), axis=-1)
    share = jnp.where(sequence.is_visual[..., None] & rows.valid[:, None], share, 0).sum(1)
    mean = share.sum(1, keepdims=True) / jnp.maximum(rows.valid.sum(1, keepdims=True), 1)
    # Rounding could lift the mean of equal shares above all of them.
    rates = rows.valid & (share >= jnp.minimum(mean, share.max(1, keepdims=True)))
    places = jnp.take_along_axis(sequence.text_index, rows.idx, axis=1)
    nobody = jnp.zeros((rates.shape[0], num_text), bool)
    return jax.vmap(lambda row, place, rate: row.at[place].max(rate))(nobody, places, rates)


def recycle_dropped(
    x: Array, scores: Array, *, recycled: int, clusters: int, context: ReductionContext
) -> tuple[Array, Array]:
    """The best of what a step drops, averaged into a few tokens.

    An average takes the place and the position of its cluster's centre (SparseVLM puts it behind
    the kept tokens; centres keep the order), and counts among the `num_kept`.

    Args:
        recycled, clusters: tokens of an image that are averaged, and what they become.

    Returns:
        x with the averages in it, and float32[B, S]: 1 for what stays, 0 for the rest.
    """
    is_visual, num_images = context.sequence.is_visual, context.num_images
    falling = jnp.where(is_visual, -finite_scores(scores), jnp.inf)
    order = rank(falling)
    num_clusters, max_clusters = clusters * num_images, clusters * context.max_images
    num_best = (context.num_kept - num_clusters)[:, None]
    best = is_visual & (order < num_best)
    again = is_visual & ~best & (order < num_best + recycled * num_images[:, None])
    rows = keep_topk(again, keep=min(recycled * context.max_images, again.shape[1]), valid=again)
    dropped = jnp.take_along_axis(x, rows.idx[..., None], axis=1)
    found = density_peaks(
        dropped, valid=rows.valid, num_clusters=num_clusters, max_clusters=max_clusters
    )
    means = mean_of_clusters(dropped, found.of_token, num_clusters=max_clusters)
    place = jnp.take_along_axis(rows.idx, found.centre, axis=1)
    place = jnp.where(found.valid, place, scores.shape[1])  # out of range: written nowhere

    def put(row: Array, place: Array, values: Array) -> Array:
        return row.at[place].set(values, mode="drop")

    stays = jax.vmap(put)(best, place, found.valid)
    return jax.vmap(put)(x, place, means), stays.astype(jnp.float32)
