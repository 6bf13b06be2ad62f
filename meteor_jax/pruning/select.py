"""The one way in which tokens are kept: a fixed-budget top-k with order preserved."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from meteor_jax.platform import target_platform
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
    scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 is not less
    count = jnp.full(scores.shape[:-1], keep, jnp.int32)
    if valid is not None:
        # Clamp first: a valid entry may score -inf and must still come before an invalid one.
        scores = jnp.where(valid, jnp.maximum(scores, jnp.finfo(jnp.float32).min), -jnp.inf)
        count = jnp.minimum(count, valid.sum(-1))
    if num_keep is not None:
        count = jnp.minimum(count, num_keep)
    places = _by_counting if target_platform() == "tpu" else _by_sorting
    return Selection(
        idx=jnp.minimum(places(scores, count, keep=keep), num_tokens - 1).astype(jnp.int32),
        valid=jnp.arange(keep) < count[..., None],
    )


def _by_sorting(scores: Array, count: Array, *, keep: int) -> Array:
    """int32[..., keep]: the places of the `count` highest in order, then N."""
    _, idx = jax.lax.top_k(scores, keep)  # stable: ties go to the lower index
    stays = jnp.arange(keep) < count[..., None]
    return jnp.sort(jnp.where(stays, idx, scores.shape[-1]), axis=-1)


def _by_counting(scores: Array, count: Array, *, keep: int) -> Array:
    """The same without a sort: each takes XLA ten seconds and more to compile for a TPU, and a
    plan has two for each of a dozen cuts."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    keys = jnp.where(bits >= sign, ~bits, bits | sign)  # ordered as the scores are
    count = count[..., None]
    # The lowest key that stays, four bits at a time: higher steps are reached by fewer keys.
    lowest = jnp.zeros_like(count, jnp.uint32)
    for shift in range(28, -1, -4):
        steps = lowest + (jnp.arange(1, 16, dtype=jnp.uint32) << shift)
        reached = (keys[..., None, :] >= steps[..., None]).sum(-1) >= count
        lowest += reached.sum(-1, keepdims=True).astype(jnp.uint32) << shift
    above, ties = keys > lowest, keys == lowest
    room = count - above.sum(-1, keepdims=True)
    stays = above | (ties & (jnp.cumsum(ties, axis=-1) <= room))
    # The j-th that stays is where their running count first exceeds j.
    return (jnp.cumsum(stays, axis=-1)[..., None, :] <= jnp.arange(keep)[:, None]).sum(-1)
