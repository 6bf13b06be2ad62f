"""Merging tokens: clusters by density, and means over clusters.

B examples, N tokens, D width, K clusters. A token that is not finite belongs to no cluster, and no
mean takes it in.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from meteor_jax.pruning.ops.select import keep_topk, largest
from meteor_jax.pruning.ops.similarity import finite_tokens
from meteor_jax.types import Array


class Clusters(flax.struct.PyTreeNode):
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
