"""METEOR (ICCV 2025, arXiv 2507.20842): tokens dropped in the encoders, where their tokens are
joined, and in the decoder. Mutual redundancy, its method at fusion, is here; its others are
`mean_token`, `attention_received` and `text_attention`.

B images, N tokens of all encoders in (encoder, patch) order, D width of the decoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.pruning.budgets import Adaptive, Fixed, Shared
from meteor_jax.pruning.method import Method, Reduction, ReductionContext, Span, gather
from meteor_jax.pruning.methods.attention_received import AttentionReceived
from meteor_jax.pruning.methods.mean_token import MeanToken
from meteor_jax.pruning.methods.text_attention import TextAttention
from meteor_jax.pruning.ops.select import finite_scores
from meteor_jax.pruning.ops.similarity import finite_tokens, rank, unit_tokens
from meteor_jax.pruning.plan import PrunePlan, Step, decoder_steps
from meteor_jax.pruning.points import FUSION, after_segment
from meteor_jax.pruning.registry import preset, register
from meteor_jax.types import Array

Similarity = Literal["cosine", "centered_cosine", "abs_cosine", "max_cosine"]


@preset
def meteor(
    *,
    fuse: int,
    encode: tuple[int, int, int] | None = None,
    layers: tuple[int, ...] = (),
    keep: tuple[int, ...] = (),
) -> PrunePlan:
    """METEOR's three stages; without `encode` not the first, without `layers` not the third.

    Args:
        encode: tokens left after each segment, over all encoders; 0 drops none there.
        fuse: tokens of an image that enter the decoder.
        layers, keep: before which layers of the decoder tokens are dropped, and how many stay.
    """
    by_segment = (MeanToken(), AttentionReceived(), AttentionReceived())
    in_encoders = tuple(
        Step(after_segment(number), method, Shared(count))
        for number, (method, count) in enumerate(zip(by_segment, encode or (), strict=False), 1)
        if count
    )
    in_decoder = decoder_steps(layers, keep, method=TextAttention(), budget=Adaptive)
    fusion = Step(FUSION, MutualRedundancy(), Fixed(fuse))
    return PrunePlan("meteor", (*in_encoders, fusion, *in_decoder))


@register("mutual_redundancy")
@dataclasses.dataclass(frozen=True)
class MutualRedundancy(Method):
    """Keeps the tokens least similar to the other encoders' tokens.

    Attributes:
        similarity: S of METEOR's mutual redundancy. "cosine" is the plain reading; but what all
            tokens of an encoder have in common then decides, so that it ranks encoders instead of
            tokens (measured, see docs). "centered_cosine", our reading, takes each encoder's mean
            token away first; "abs_cosine" ignores the sign; "max_cosine" counts the most similar
            token alone instead of the sum over all.
        num_iterations: 1 drops all at once (METEOR as read). With more, each drops its share and R
            is computed again over the tokens left, so that one copy of what two encoders share can
            stay.
        min_share_per_encoder: share of `keep` that every encoder gets (our addition; 0 is METEOR).
    """

    stages = ("fuse",)
    needs = frozenset({"encoder_parts"})

    similarity: Similarity = "centered_cosine"
    num_iterations: int = 1
    min_share_per_encoder: float = 0.0

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations: expected 1 or more, got {self.num_iterations}.")

    def scores(self, x: Array, *, context: ReductionContext) -> Array:
        """float32[B, N]: minus R, which every iteration counts again over what is left."""
        if context.encoder_parts is not None:
            if self.num_iterations > 1:
                raise ValueError(
                    f"fuse.num_iterations={self.num_iterations}, but fusion='pre' drops whole "
                    "places at once; set fuse.num_iterations=1."
                )
            return -position_redundancy(context.encoder_parts, similarity=self.similarity)
        num_tokens, spans = x.shape[1], context.spans
        scores = -mutual_redundancy(x, spans=spans, similarity=self.similarity)
        for done in range(1, self.num_iterations):
            size = num_tokens - (num_tokens - context.keep) * done // self.num_iterations
            left = rank(-scores) < size
            redundancy = mutual_redundancy(x, spans=spans, similarity=self.similarity, left=left)
            scores = jnp.where(left, -redundancy, -jnp.inf)
        return scores

    def select(self, x: Array, scores: Array, *, context: ReductionContext) -> Reduction:
        sure = best_of_each(
            x,
            scores,
            keep=context.keep,
            min_share=self.min_share_per_encoder,
            spans=context.spans,
        )
        return gather(x, context.keep_best(scores, always=sure))


def mutual_redundancy(
    x: Array,
    *,
    spans: tuple[Span, ...],
    similarity: Similarity = "cosine",
    left: Array | None = None,
) -> Array:
    """METEOR's R_i^j = Σ_{l≠j} Σ_m S(z_i^j, z_m^l): how much other encoders say the same.

    With a signed cosine the sum is linear, R_i^j = u_i · Σ of all other encoders' unit tokens,
    so no N × N matrix is built; "abs_cosine" needs one, and "max_cosine", which takes the largest
    instead of the sum. A token that is not finite counts for no other.

    Shapes:
        x: float[B, N, D].
        left: bool[B, N], the tokens z_m^l that count; None is all.
        returns: float32[B, N]; infinity for a token that is not finite.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    finite = finite_tokens(x)
    left = finite if left is None else left & finite
    parts = [span.of(x) for span in spans]
    if similarity == "centered_cosine":
        parts = [_centered(part, span.of(finite)) for part, span in zip(parts, spans, strict=True)]
    units = [unit_tokens(part) for part in parts]
    if similarity in ("abs_cosine", "max_cosine"):
        encoder = np.repeat(np.arange(len(spans)), [span.size for span in spans])
        counts = left[:, None] & (encoder[:, None] != encoder)
        unit = jnp.concatenate(units, axis=1)
        cosine = jnp.einsum("bnd,bmd->bnm", unit, unit)
        if similarity == "abs_cosine":
            redundancy = jnp.where(counts, jnp.abs(cosine), 0).sum(-1)
        else:
            redundancy = jnp.where(counts, cosine, -1).max(-1)
        return jnp.where(finite, redundancy, jnp.inf)
    sums = [
        jnp.where(span.of(left)[..., None], unit, 0).sum(1)
        for unit, span in zip(units, spans, strict=True)
    ]
    redundancy = [
        jnp.einsum("bnd,bd->bn", unit, sum(sums) - own)
        for unit, own in zip(units, sums, strict=True)
    ]
    return jnp.where(finite, jnp.concatenate(redundancy, axis=1), jnp.inf)


def _centered(x: Array, finite: Array) -> Array:
    """float32[B, N, D] less the mean of the tokens that are `finite`, bool[B, N]."""
    total = jnp.where(finite[..., None], x, 0).mean(1, keepdims=True)
    return x - total * (x.shape[1] / jnp.maximum(finite.sum(1), 1))[:, None, None]


def position_redundancy(parts: Sequence[Array], *, similarity: Similarity = "cosine") -> Array:
    """Σ_j R_i^j over the encoders: how much they repeat one another at a place of a common grid.

    For models that join channels, where a token is a place and holds every encoder; with it,
    unmodified EAGLE weights can be pruned. Our reading, not METEOR's.

    Shapes:
        parts: float[B, N, D] an encoder, all in one space (`Projector.parts`).
        returns: float32[B, N].
    """
    size = parts[0].shape[1]
    spans = tuple(Span(str(i), start=i * size, size=size, grid=0) for i in range(len(parts)))
    redundancy = mutual_redundancy(
        jnp.concatenate(parts, axis=1), spans=spans, similarity=similarity
    )
    return redundancy.reshape(redundancy.shape[0], len(parts), size).sum(1)


def best_of_each(
    x: Array, scores: Array, *, keep: int, min_share: float, spans: tuple[Span, ...]
) -> Array | None:
    """bool[B, N]: each encoder's best `min_share · keep` tokens, which stay whatever the others
    score; None without a share. A token that is not finite is none of them."""
    if min_share <= 0:
        return None
    sure = [min(int(min_share * keep), span.size) for span in spans]
    if sum(sure) > keep:
        raise ValueError(
            f"fuse.min_share_per_encoder={min_share}: {len(spans)} encoders get more than the "
            "fuse.keep tokens there are; lower it."
        )
    falling = -finite_scores(scores)
    best = [rank(span.of(falling)) < count for span, count in zip(spans, sure, strict=True)]
    return jnp.concatenate(best, axis=1) & finite_tokens(x)
