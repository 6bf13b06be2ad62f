"""The one way in which tokens are kept: a fixed-budget top-k with order preserved."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from meteor_jax.types import Array


@flax.struct.dataclass
class Selection:
    """Which entries stay: `idx` int32[..., K] in increasing order, `valid` bool[..., K].

    Invalid entries stand last; their indices point at real entries, so a gather is always safe.
    """

    idx: Array
    valid: Array


def keep_topk(
    scores: Array,
    *,
    keep: int,
    valid: Array | None = None,
    num_keep: Array | None = None,
) -> Selection:
    """Keeps the `keep` entries with the highest scores, in their original order.

    Of equal scores the earlier entry wins. An invalid entry is never kept before a valid one.

    Shapes:
        scores: float[..., N]; no gradient flows through them.
        valid: bool[..., N].
        num_keep: int32[...]; how many of the `keep` places an example really fills.
        returns: Selection of [..., keep].

    Raises:
        ValueError: if `keep` is larger than N.
    """
    num_tokens = scores.shape[-1]
    if keep > num_tokens:
        raise ValueError(
            f"cannot keep {keep} of {num_tokens} tokens; lower the plan's budget to at most "
            f"{num_tokens}."
        )
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    if valid is not None:
        # Clamp first: a valid entry may score -inf and must still come before an invalid one.
        scores = jnp.where(valid, jnp.maximum(scores, jnp.finfo(jnp.float32).min), -jnp.inf)
    _, idx = jax.lax.top_k(scores, keep)  # stable: ties go to the lower index
    kept = jnp.ones(idx.shape, bool)
    if valid is not None:
        kept &= jnp.take_along_axis(valid, idx, axis=-1)
    if num_keep is not None:
        kept &= jnp.arange(keep) < num_keep[..., None]
    # Dropped places sort behind every real index, then point at their real entry again.
    order = jnp.sort(jnp.where(kept, idx, idx + num_tokens), axis=-1)
    return Selection(
        idx=jnp.where(order >= num_tokens, order - num_tokens, order).astype(jnp.int32),
        valid=order < num_tokens,
    )
