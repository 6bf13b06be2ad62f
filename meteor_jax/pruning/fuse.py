"""Stage 2: what the encoders share is dropped where they are joined.

I images, N tokens of all encoders in (encoder, raster) order, D width of the LLM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.pruning.encode import allocate, mean_token_similarity, random_scores
from meteor_jax.pruning.ops.diversity import farthest_points, finite_tokens, rank, unit_tokens
from meteor_jax.pruning.ops.select import finite_scores, keep_topk
from meteor_jax.pruning.plan import FusePlan
from meteor_jax.types import Array, VisualTokens, take_tokens


@dataclasses.dataclass(frozen=True)
class Span:
    """One encoder's tokens within the joined row: `[start, start + size)`. Static.

    Attributes:
        grid: side of the encoder's full output grid, which pooling needs.
    """

    encoder: str
    start: int
    size: int
    grid: int

    def of(self, x: Array) -> Array:
        """The encoder's part of `x`, [I, N, ...]."""
        return x[:, self.start : self.start + self.size]


@jax.named_scope("scores")
def fuse(
    tokens: VisualTokens,
    *,
    plan: FusePlan,
    spans: tuple[Span, ...],
    image_seed: Array,
    scores: Array | None = None,
) -> VisualTokens:
    """The `plan.keep` tokens that enter the LLM, in (encoder, raster) order.

    Shapes:
        tokens: VisualTokens of [I, N, D]; `spans` say which encoder holds which.
        image_seed: uint32[I]; a hash of each image, so that "random" does not depend on the batch.
        scores: float32[I, N]; ranks the tokens instead of `fuse_scores`.

    Raises:
        ValueError: if the budget is larger than N, or pooling meets tokens cut before.
    """
    if plan.keep > tokens.num_tokens:
        raise ValueError(
            f"fuse.keep={plan.keep} but only {tokens.num_tokens} tokens reach fusion; lower "
            "fuse.keep or keep more inside the encoders."
        )
    if plan.criterion == "pool":
        return _pool(tokens, keep=plan.keep, spans=spans)
    if plan.criterion == "independent":
        idx = _keep_in_each(tokens.x, keep=plan.keep, spans=spans)
    else:
        if scores is None:
            scores = fuse_scores(tokens.x, plan=plan, spans=spans, image_seed=image_seed)
        sure = _best_of_each(
            tokens.x, scores, keep=plan.keep, min_share=plan.min_share_per_encoder, spans=spans
        )
        idx = keep_topk(scores, keep=plan.keep, always=sure).idx
    return take_tokens(tokens, idx)


def fuse_scores(x: Array, *, plan: FusePlan, spans: tuple[Span, ...], image_seed: Array) -> Array:
    """float32[I, N]: what ranks the tokens of all encoders jointly; the highest stay."""
    num_tokens = x.shape[1]
    if plan.criterion == "cooperative":
        return _least_redundant(x, plan=plan, spans=spans)
    if plan.criterion == "random":
        return random_scores(image_seed, seed=plan.seed, num_tokens=num_tokens)
    if plan.criterion == "max_min":
        return farthest_points(x, keep=plan.keep)
    # "uniform": the tokens in the middle of `keep` equal strides over the joined row.
    kept = (np.arange(plan.keep) + 0.5) * num_tokens / plan.keep
    scores = np.zeros(num_tokens, np.float32)
    scores[kept.astype(int)] = 1.0
    return jnp.broadcast_to(scores, x.shape[:2])


def _least_redundant(x: Array, *, plan: FusePlan, spans: tuple[Span, ...]) -> Array:
    """float32[I, N]: minus R, which every round counts anew over what the one before left."""
    num_tokens = x.shape[1]
    scores = -mutual_redundancy(x, spans=spans, similarity=plan.similarity)
    for done in range(1, plan.num_iterations):
        size = num_tokens - (num_tokens - plan.keep) * done // plan.num_iterations
        left = rank(-scores) < size
        redundancy = mutual_redundancy(x, spans=spans, similarity=plan.similarity, left=left)
        scores = jnp.where(left, -redundancy, -jnp.inf)
    return scores


def mutual_redundancy(
    x: Array, *, spans: tuple[Span, ...], similarity: str = "cosine", left: Array | None = None
) -> Array:
    """METEOR's R_i^j = Σ_{l≠j} Σ_m S(z_i^j, z_m^l): how much other encoders say the same.

    With a signed cosine the sum is linear, R_i^j = u_i · Σ of all other encoders' unit tokens,
    so no N × N matrix is built; "abs_cosine" needs one, and "max_cosine", which takes the largest
    instead of the sum. A token that is not finite counts for no other.

    Shapes:
        x: float[I, N, D].
        left: bool[I, N], the tokens z_m^l that count; None is all.
        returns: float32[I, N]; infinity for a token that is not finite.
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
        cosine = jnp.einsum("ind,imd->inm", unit, unit)
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
        jnp.einsum("ind,id->in", unit, sum(sums) - own)
        for unit, own in zip(units, sums, strict=True)
    ]
    return jnp.where(finite, jnp.concatenate(redundancy, axis=1), jnp.inf)


def _centered(x: Array, finite: Array) -> Array:
    """float32[I, N, D] less the mean of the tokens that are `finite`, bool[I, N]."""
    total = jnp.where(finite[..., None], x, 0).mean(1, keepdims=True)
    return x - total * (x.shape[1] / jnp.maximum(finite.sum(1), 1))[:, None, None]


def position_redundancy(parts: Sequence[Array], *, similarity: str = "cosine") -> Array:
    """Σ_j R_i^j over the encoders: how much they repeat one another at a place of a common grid.

    For models that join channels, where a token is a place and holds every encoder; with it,
    unmodified EAGLE weights can be pruned. Our reading, not METEOR's.

    Shapes:
        parts: float[I, N, D] an encoder, all in one space (`Projector.parts`).
        returns: float32[I, N].
    """
    size = parts[0].shape[1]
    spans = tuple(Span(str(i), start=i * size, size=size, grid=0) for i in range(len(parts)))
    redundancy = mutual_redundancy(
        jnp.concatenate(parts, axis=1), spans=spans, similarity=similarity
    )
    return redundancy.reshape(redundancy.shape[0], len(parts), size).sum(1)


def _best_of_each(
    x: Array, scores: Array, *, keep: int, min_share: float, spans: tuple[Span, ...]
) -> Array | None:
    """bool[I, N]: each encoder's best `min_share · keep` tokens, which stay whatever the others
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


def _keep_in_each(x: Array, *, keep: int, spans: tuple[Span, ...]) -> Array:
    """int32[I, keep]: every encoder keeps its share of tokens least like its own mean token."""
    sizes = {span.encoder: span.size for span in spans}
    shares = allocate(keep, ranks=sizes, available=sizes, assignment="rank")
    return jnp.concatenate(
        [
            span.start
            + keep_topk(-mean_token_similarity(span.of(x)), keep=shares[span.encoder]).idx
            for span in spans
        ],
        axis=1,
    )


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


def _pool(tokens: VisualTokens, *, keep: int, spans: tuple[Span, ...]) -> VisualTokens:
    """Averages cells of each encoder's grid; a cell takes the place of its middle token."""
    for span in spans:
        if span.size != span.grid**2:
            raise ValueError(
                f"pool needs {span.encoder}'s whole {span.grid}×{span.grid} grid, but "
                f"{span.size} tokens arrive; use it without stage 1."
            )
    pooled, middles = [], []
    for span, side in zip(spans, pooled_grids(keep, spans=spans), strict=True):
        weights = _cell_weights(span.grid, side)
        x = span.of(tokens.x).reshape(-1, span.grid, span.grid, tokens.x.shape[-1])
        x = jnp.einsum("pg,qh,ighd->ipqd", weights, weights, x)
        pooled.append(x.reshape(x.shape[0], side * side, -1))
        middle = ((np.arange(side) + 0.5) * span.grid / side).astype(int)
        middles.append(span.start + (middle[:, None] * span.grid + middle).ravel())
    idx = jnp.asarray(np.concatenate(middles), jnp.int32)
    places = take_tokens(tokens, jnp.broadcast_to(idx, (tokens.x.shape[0], idx.size)))
    return places.replace(x=jnp.concatenate(pooled, axis=1).astype(tokens.x.dtype))


def _cell_weights(grid: int, side: int) -> np.ndarray:
    """float32[side, grid]: each row averages the grid lines that its cell covers, by overlap."""
    edges = np.arange(side + 1) * grid / side
    lines = np.arange(grid)
    overlap = np.minimum(edges[1:, None], lines + 1) - np.maximum(edges[:-1, None], lines)
    overlap = np.maximum(overlap, 0)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)
