"""How every method selects tokens: a top-k of static size that preserves their order."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.pruning.ops.windows import window_quotas, window_slots
from meteor_jax.types import Array

LOWEST = float(jnp.finfo(jnp.float32).min)


class Selection(flax.struct.PyTreeNode):
    """Which entries are kept: `idx` int32[..., K] in increasing order, `valid` bool[..., K].

    Invalid entries are last; their indices point at real entries, so a gather is always safe.
    """

    idx: Array
    valid: Array


def keep_topk(
    scores: Array,
    *,
    keep: int,
    valid: Array | None = None,
    always: Array | None = None,
    num_keep: Array | None = None,
) -> Selection:
    """Keeps the `keep` entries with the highest scores, in their original order.

    First come the entries that are `always` kept, then the finite scores, then those that are not
    finite (NaN, an overflow), and an invalid entry never before a valid one. Of equals the earlier
    wins.

    Shapes:
        scores: float[..., N]; no gradient flows through them.
        valid, always: bool[..., N].
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
    scores = finite_scores(scores)
    if always is not None:
        scores = jnp.where(always, jnp.inf, scores)
    if valid is not None:
        scores = jnp.where(valid, scores, -jnp.inf)
    _, idx = largest(scores, keep)
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


def finite_scores(scores: Array) -> Array:
    """float32[...], without a gradient: a score that is not finite becomes the lowest of all.

    XLA ranks NaN above infinity, so one overflow would be kept before everything else.
    """
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
    scores = jnp.where(scores == 0, 0.0, scores)  # XLA's top-k ranks −0 below 0, its sort does not
    return jnp.where(jnp.isfinite(scores), scores, LOWEST)


def largest(scores: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest of float32[..., N], falling, and their places; no NaN among them.

    Of equals the earlier comes first. On a mesh every device ranks its own rows: XLA's top-k on
    CPUs and GPUs is a kernel that it cannot split, and would gather all of them.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return jax.lax.top_k(scores, count)  # on CPUs three times as fast as to sort
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    falling, place = jax.lax.sort((-scores, place), num_keys=1)
    return -falling[..., :count], place[..., :count]


def keep_in_windows(scores: Array, *, keep: int, sizes: tuple[int, ...]) -> Selection:
    """The best tokens of each window, in proportion to what it holds, so that every shape is static
    (METEOR is silent on windows: our reading).

    Shapes:
        scores: float[B, N], window after window, of `sizes` tokens each.
    """
    quotas = window_quotas(keep, sizes)
    slots, real = window_slots(sizes, length=max(sizes))
    scores = scores[:, slots]
    selection = keep_topk(
        scores,
        keep=max(quotas),
        valid=jnp.broadcast_to(real, scores.shape),
        num_keep=jnp.broadcast_to(jnp.asarray(quotas), scores.shape[:2]),
    )
    idx = selection.idx + slots[:, :1]
    # How many of a window's places are filled is known, so the gaps go without a mask.
    filled = np.flatnonzero(np.arange(max(quotas)) < np.asarray(quotas)[:, None])
    idx = idx.reshape(idx.shape[0], -1)[:, filled]
    return Selection(idx=idx, valid=jnp.ones(idx.shape, bool))
