"""How alike tokens are. A token that is not finite (NaN, an overflow) is like no other.

B examples (or images), N tokens, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from meteor_jax.types import Array


def unit_tokens(x: Array) -> Array:
    """float32[..., D] of length 1; zeros for a token of zeros, or one that is not finite. No
    gradient flows."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(norm), x / (norm + 1e-6), 0)


def finite_tokens(x: Array) -> Array:
    """bool[..., N] of float[..., N, D]: whether a token's length is finite in float32."""
    return jnp.isfinite(jnp.linalg.norm(x.astype(jnp.float32), axis=-1))


def mean_token_similarity(x: Array) -> Array:
    """Redundancy of each token: its cosine with the mean of the image's tokens.

    The mean token carries what the tokens share, mostly background.

    Shapes:
        x: float[I, N, E].
        returns: float32[I, N] in [−1, 1]; 0 for a token, or a mean, that is all zeros; infinity
            for a token that is not finite, which the mean leaves out.
    """
    x = x.astype(jnp.float32)
    finite = finite_tokens(x)
    # Their sum over N is as good as their mean: a cosine does not see its length.
    mean = jnp.where(finite[..., None], x, 0).mean(axis=-2, keepdims=True)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(mean, axis=-1)
    similarity = (x * mean).sum(-1) / jnp.maximum(norms, 1e-12)
    return jnp.where(finite, similarity, jnp.inf)


def rank(values: Array) -> Array:
    """int32[B, N]: 0 for the smallest of each row; of equal values the earlier comes first."""
    return jnp.argsort(jnp.argsort(values, axis=1, stable=True), axis=1)
