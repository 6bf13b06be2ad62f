"""Selections and merges that look at how alike tokens are: DivPrune, DART, VisionZip, SparseVLM.

Pure functions of arrays. Selections come out as scores for `keep_topk`, so that order, padding and
budgets are handled in one place. A token that is not finite (NaN, an overflow) counts for nothing:
it is like no other, is chosen after all others, and no mean takes it in.

B examples (or images), N tokens, D width, P pivots, K clusters.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.pruning.ops.select import keep_topk, largest
from meteor_jax.types import Array

FARTHEST = 3.0  # more than any cosine distance


def unit_tokens(x: Array) -> Array:
    """float32[..., D] of length 1; zeros for a token of zeros, or one that is not finite. No
    gradient flows."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(norm), x / (norm + 1e-6), 0)


def finite_tokens(x: Array) -> Array:
    """bool[..., N] of float[..., N, D]: whether a token's length is finite in float32."""
    return jnp.isfinite(jnp.linalg.norm(x.astype(jnp.float32), axis=-1))


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


def unlike_pivots(
    x: Array, *, pivots: Array, pivot_valid: Array, candidates: Array, num_keep: Array
) -> Array:
    """The candidates that are least like some pivots, as DART chooses (EMNLP 2025).

    Each pivot in turn takes an equal share of those not taken yet, the least similar by cosine;
    the first pivots take one more where the shares do not come out even.

    Shapes:
        x: float[B, N, D]; pivots: int32[B, P], places in x; pivot_valid: bool[B, P].
        candidates: bool[B, N]; num_keep: int32[B].
        returns: bool[B, N].
    """
    unit = unit_tokens(x)
    chosen = jnp.take_along_axis(unit, pivots[..., None], axis=1)
    similarity = jnp.einsum("bpd,bnd->bpn", chosen, unit)
    similarity = jnp.where(finite_tokens(x)[:, None], similarity, FARTHEST)  # taken last
    count = jnp.maximum(pivot_valid.sum(1, keepdims=True), 1)
    turn = jnp.cumsum(pivot_valid, axis=1) - 1
    shares = num_keep[:, None] // count + (turn < num_keep[:, None] % count)
    shares = jnp.where(pivot_valid, shares, 0)

    def take(taken: Array, pivot: tuple[Array, Array]) -> tuple[Array, None]:
        similarity, share = pivot
        free = candidates & ~taken
        order = rank(jnp.where(free, similarity, jnp.inf))
        return taken | (free & (order < share[:, None])), None

    taken, _ = jax.lax.scan(take, jnp.zeros_like(candidates), (similarity.swapaxes(0, 1), shares.T))
    return taken


def merge_rest(x: Array, scores: Array, *, keep: int, merged: int) -> tuple[Array, Array]:
    """Dominant tokens, and a few that gather the rest, as VisionZip (CVPR 2025, 2412.04467) does.

    The `keep - merged` tokens with the largest scores stay as they are. Of the rest, `merged` at
    even strides become targets; every other one goes to the target that it is most like, and their
    mean is added to that target.

    Shapes:
        x: float[B, N, D], keep < N; scores: float[B, N].
        returns: float[B, keep, D], and int32[B, keep], the places they had, increasing.
    """
    num_tokens = x.shape[1]
    dominant = keep_topk(scores, keep=keep - merged).idx
    is_rest = jnp.ones(x.shape[:2], bool)
    is_rest = jax.vmap(lambda row, idx: row.at[idx].set(False))(is_rest, dominant)
    rest = keep_topk(is_rest, keep=num_tokens - keep + merged).idx
    strided = rest.shape[1] // merged * np.arange(merged)
    targets, others = rest[:, strided], jnp.delete(rest, strided, axis=1)

    def of(idx: Array, array: Array = x) -> Array:
        return jnp.take_along_axis(array, idx[..., None], axis=1)

    unit, finite = unit_tokens(x), finite_tokens(x)[..., None]
    similarity = jnp.einsum("bnd,bkd->bnk", of(others, unit), of(targets, unit))
    target = jnp.where(of(others, finite)[..., 0], similarity.argmax(-1), merged)
    mean = mean_of_clusters(of(others), target, num_clusters=merged)
    itself = jnp.where(of(targets, finite), of(targets), 0)
    places = jnp.concatenate([dominant, targets], axis=1)
    kept = jnp.concatenate([of(dominant), itself + mean], axis=1)
    order = jnp.argsort(places, axis=1)
    return of(order, kept), jnp.take_along_axis(places, order, axis=1)


@flax.struct.dataclass
class Clusters:
    """Centres int32[B, K] (places in x, increasing), which of them are real bool[B, K], and the
    centre that each token belongs to, int32[B, N]; K for a token that is invalid or not finite."""

    centre: Array
    valid: Array
    of_token: Array


def density_peaks(x: Array, *, valid: Array, num_clusters: Array, max_clusters: int) -> Clusters:
    """Clusters by density peaks, which SparseVLM recycles tokens with (Du et al., kNN variant).

    A token's density falls with the mean squared distance to its `num_clusters` nearest; centres
    are dense and far from anything denser; the others go to their nearest centre. Of equal
    densities the earlier counts as higher (SparseVLM adds noise instead).

    Shapes:
        x: float[B, N, D]; valid: bool[B, N]; num_clusters: int32[B], at most `max_clusters` = K.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    valid = valid & finite_tokens(x)
    square = (x**2).sum(-1)
    inner = jnp.einsum("bnd,bmd->bnm", x, x)
    square = jnp.maximum(square[:, :, None] + square[:, None] - 2 * inner, 0) / x.shape[-1]
    pair = valid[:, :, None] & valid[:, None]
    place = jnp.arange(x.shape[1])
    square = jnp.where(place[:, None] == place, 0, square)  # rounding left a little there
    nearest = -largest(jnp.where(pair, -square, -jnp.inf), max_clusters)[0]
    counts = jnp.arange(max_clusters) < num_clusters[:, None]
    total = jnp.where(counts[:, None] & jnp.isfinite(nearest), nearest, 0).sum(-1)
    density = jnp.exp(-total / jnp.maximum(num_clusters[:, None], 1))

    higher = density[:, None] > density[:, :, None]
    higher |= (density[:, None] == density[:, :, None]) & (place < place[:, None])
    farthest = jnp.where(pair, square, 0).max((1, 2))[:, None, None]
    apart = jnp.where(higher & pair, square, farthest).min(-1)
    peaks = keep_topk(
        jnp.sqrt(apart) * density, keep=max_clusters, valid=valid, num_keep=num_clusters
    )

    to_centre = jnp.take_along_axis(square, peaks.idx[..., None], axis=1)
    # A centre stays with itself, even where another lies on the same spot.
    to_centre = jnp.where(peaks.idx[..., None] == place, -1, to_centre)
    to_centre = jnp.where(peaks.valid[..., None], to_centre, jnp.inf)
    of_token = jnp.where(valid, to_centre.argmin(1), max_clusters)
    return Clusters(centre=peaks.idx, valid=peaks.valid, of_token=of_token)


def mean_of_clusters(x: Array, of_token: Array, *, num_clusters: int) -> Array:
    """float[B, K, D]: the mean of float[B, N, D] by cluster int32[B, N]; 0 for an empty one. A
    token of cluster K counts nowhere."""
    x = jnp.where(of_token[..., None] < num_clusters, x, 0)  # 0 · NaN would be NaN
    member = jax.nn.one_hot(of_token, num_clusters, dtype=x.dtype)
    total = jnp.einsum("bnk,bnd->bkd", member, x, preferred_element_type=jnp.float32)
    count = jnp.maximum(member.astype(jnp.float32).sum(1), 1)
    return (total / count[..., None]).astype(x.dtype)


def rank(values: Array) -> Array:
    """int32[B, N]: 0 for the smallest of each row; of equal values the earlier comes first."""
    return jnp.argsort(jnp.argsort(values, axis=1, stable=True), axis=1)
