"""Stage 3: cuts between layers of the LLM, guided by the text.

B examples, T text tokens, S entries of the packed sequence, H heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from meteor_jax.pruning.ops.diversity import density_peaks, mean_of_clusters, unlike_pivots
from meteor_jax.pruning.ops.select import Selection, finite_scores, keep_topk
from meteor_jax.pruning.plan import DecodePlan
from meteor_jax.types import Array, CutTrace, Sequence


def query_weights(sequence: Sequence, *, plan: DecodePlan, raters: Array | None = None) -> Array:
    """float32[B, S]: which entries' attention counts; text only.

    Shapes:
        raters: bool[B, T] of `text_query_mask`, for queries "raters".
    """
    if plan.queries == "raters":
        chosen = jnp.take_along_axis(raters, sequence.slot, axis=1)
        return (chosen & sequence.is_text).astype(jnp.float32)
    if plan.queries == "last":
        place = jnp.arange(sequence.valid.shape[1])
        last = jnp.max(jnp.where(sequence.is_text, place, -1), axis=1, keepdims=True)
        return (place == last).astype(jnp.float32)
    return text_after_image(sequence).astype(jnp.float32)


def text_after_image(sequence: Sequence) -> Array:
    """bool[B, S]: the text entries that follow a row's last visual token."""
    place = jnp.arange(sequence.valid.shape[1])
    last_visual = jnp.max(jnp.where(sequence.is_visual, place, -1), axis=1, keepdims=True)
    return sequence.is_text & (place > last_visual)


@jax.named_scope("scores")
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
    slots = jnp.take_along_axis(sequence.slot, rows.idx, axis=1)
    nobody = jnp.zeros((rates.shape[0], num_text), bool)
    return jax.vmap(lambda row, slot, rate: row.at[slot].max(rate))(nobody, slots, rates)


def visual_attention_value(received: Array, sequence: Sequence) -> Array:
    """float32[B, H]: VAV_h = Σ_i a_{i,h} over the visual tokens.

    Shapes:
        received: float32[B, H, S]; the text's attention to every entry, head by head.
    """
    return jnp.einsum("bhs,bs->bh", received, sequence.is_visual.astype(jnp.float32))


@jax.named_scope("scores")
def cut_scores(
    sequence: Sequence,
    *,
    plan: DecodePlan,
    cut: int,
    num_images: Array,
    received: Array | None = None,
    keys: Array | None = None,
) -> tuple[Array, Array, Array]:
    """What ranks the visual tokens, and the attention that sets their number.

    Shapes:
        received: float32[B, H, S], which "text_attention" needs.
        keys: float[B, S, K, d] of the layer before the cut, which "pivots" needs.

    Returns:
        scores float32[B, S], mass float32[B] (Σ over the chosen heads of their VAV), and
        VAV float32[B, H]; the last two are 0 for criteria without attention.
    """
    batch, length = sequence.valid.shape
    if plan.criterion == "text_attention":
        vav = visual_attention_value(received, sequence)
        num_heads = vav.shape[1]
        chosen = min(plan.heads, num_heads) if plan.heads else num_heads
        heads = keep_topk(vav, keep=chosen).idx
        scores = jnp.take_along_axis(received, heads[..., None], axis=1).sum(1)
        return scores, jnp.take_along_axis(vav, heads, axis=1).sum(1), vav
    nothing = jnp.zeros((batch,), jnp.float32)
    if plan.criterion == "random":
        # By visual index, not by place, so that padding does not change what is drawn.
        key = jax.random.fold_in(jax.random.key(plan.seed), cut)
        table = jax.random.uniform(key, (length,))
        return table[jnp.maximum(sequence.visual, 0)], nothing, nothing[:, None]
    if plan.criterion == "pivots":
        scores = pivot_scores(sequence, keys, plan=plan, cut=cut, num_images=num_images)
        return scores, nothing, nothing[:, None]
    # "uniform": visual tokens at equal strides among those still there.
    is_visual = sequence.is_visual
    rank = jnp.cumsum(is_visual, axis=1) - 1
    alive = jnp.maximum(is_visual.sum(1, keepdims=True), 1)
    keep = plan.keep[cut] * num_images[:, None]
    stride = jnp.floor((rank + 1) * keep / alive) > jnp.floor(rank * keep / alive)
    return stride.astype(jnp.float32), nothing, nothing[:, None]


def pivot_scores(
    sequence: Sequence, keys: Array, *, plan: DecodePlan, cut: int, num_images: Array
) -> Array:
    """float32[B, S]: 1 for what DART keeps (EMNLP 2025, arXiv 2502.11494), 0 for the rest.

    Pivots are the visual tokens, and the tokens of the text after the image, whose keys have the
    largest L1 norm over all heads. Visual pivots stay; the rest of the budget is `unlike_pivots`,
    by the states that enter the layer after the cut.

    Shapes:
        keys: float[B, S, K, d] of the layer before the cut.
    """
    strength = jnp.abs(keys.astype(jnp.float32)).sum((-2, -1))
    is_visual = sequence.is_visual
    budget = jnp.minimum(plan.keep[cut] * num_images, is_visual.sum(1))

    def strongest(group: Array, *, count: int, most: Array | None = None) -> Selection:
        keep = min(count, strength.shape[1])
        return keep_topk(strength, keep=keep, valid=group, num_keep=most)

    after = text_after_image(sequence)
    visual = strongest(is_visual, count=plan.pivots[0], most=budget)
    text = strongest(after, count=plan.pivots[1])
    is_pivot = jax.vmap(lambda row, idx, valid: row.at[idx].max(valid))(
        jnp.zeros_like(is_visual), visual.idx, visual.valid
    )
    taken = unlike_pivots(
        sequence.x,
        pivots=jnp.concatenate([visual.idx, text.idx], axis=1),
        pivot_valid=jnp.concatenate([visual.valid, text.valid], axis=1),
        candidates=is_visual & ~is_pivot,
        num_keep=budget - visual.valid.sum(1),
    )
    return (is_pivot | taken).astype(jnp.float32)


@jax.named_scope("scores")
def recycle_dropped(
    sequence: Sequence,
    scores: Array,
    *,
    recycled: int,
    clusters: int,
    num_images: Array,
    max_images: int,
    num_kept: Array,
) -> tuple[Sequence, Array]:
    """SparseVLM's recycling: the best of what a cut drops, averaged into a few tokens.

    An average takes the place and the position of its cluster's centre (SparseVLM puts it behind
    the kept tokens; centres keep the order), and counts among the `num_kept`.

    Args:
        recycled, clusters: tokens of an image that are averaged, and what they become.
        num_images: int32[B], at most `max_images`; num_kept: int32[B].

    Returns:
        The sequence with the averages in it, and float32[B, S]: 1 for what stays, 0 for the rest.
    """
    is_visual = sequence.is_visual
    falling = jnp.where(is_visual, -finite_scores(scores), jnp.inf)
    order = jnp.argsort(falling, axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    num_clusters = clusters * num_images
    num_best = (num_kept - num_clusters)[:, None]
    best = is_visual & (rank < num_best)
    again = is_visual & ~best & (rank < num_best + recycled * num_images[:, None])
    rows = keep_topk(again, keep=min(recycled * max_images, again.shape[1]), valid=again)
    x = jnp.take_along_axis(sequence.x, rows.idx[..., None], axis=1)
    found = density_peaks(
        x, valid=rows.valid, num_clusters=num_clusters, max_clusters=clusters * max_images
    )
    means = mean_of_clusters(x, found.of_token, num_clusters=clusters * max_images)
    place = jnp.take_along_axis(rows.idx, found.centre, axis=1)
    place = jnp.where(found.valid, place, scores.shape[1])  # out of range: written nowhere

    def put(row: Array, place: Array, values: Array) -> Array:
        return row.at[place].set(values, mode="drop")

    stays = jax.vmap(put)(best, place, found.valid)
    return sequence.replace(x=jax.vmap(put)(sequence.x, place, means)), stays.astype(jnp.float32)


def num_kept(
    mass: Array, sequence: Sequence, *, plan: DecodePlan, cut: int, num_images: Array
) -> Array:
    """int32[B]: K of every example, METEOR's λ · Σ VAV, clipped; never more than there are.

    Raises:
        ValueError: if the budget is adaptive and λ was never measured.
    """
    low, high = plan.bounds(cut)
    if plan.budget == "adaptive":
        plan.check_measured()
        wanted = jnp.nan_to_num(jnp.round(plan.scale[cut] * mass))  # not a number: the least
        per_image = jnp.clip(wanted, low, high).astype(jnp.int32)
    else:
        per_image = jnp.full(mass.shape, high, jnp.int32)
    return jnp.minimum(per_image * num_images, sequence.is_visual.sum(1)).astype(jnp.int32)


def select_entries(
    sequence: Sequence, scores: Array, *, num_kept: Array, num_text: int, num_visual: int
) -> Selection:
    """All text and the `num_kept[b]` best visual tokens, packed into `num_text + num_visual`."""
    return keep_topk(
        scores,
        keep=min(num_text + num_visual, scores.shape[1]),
        valid=sequence.valid,
        always=sequence.is_text,
        num_keep=sequence.is_text.sum(1) + num_kept,
    )


def take_entries(
    sequence: Sequence, selection: Selection, *, positions: str = "original"
) -> Sequence:
    """The sequence that is left; "contiguous" gives the kept entries the positions 0, 1, 2, …"""

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, selection.idx, axis=1)

    position = take(sequence.position)
    if positions == "contiguous":
        position = jnp.broadcast_to(jnp.arange(position.shape[1]), position.shape)
    return Sequence(
        x=jnp.take_along_axis(sequence.x, selection.idx[..., None], axis=1),
        position=position,
        valid=selection.valid,
        slot=take(sequence.slot),
        visual=take(sequence.visual),
    )


def trace_cut(sequence: Sequence, *, capacity: int, num_computed: Array, vav: Array) -> CutTrace:
    """The `CutTrace` of the sequence that a cut left; `capacity` visual tokens at most."""
    is_visual = sequence.is_visual
    capacity = min(capacity, is_visual.shape[1])
    first = keep_topk(jnp.zeros(is_visual.shape), keep=capacity, valid=is_visual)
    visual = jnp.take_along_axis(sequence.visual, first.idx, axis=1)
    return CutTrace(
        visual=jnp.where(first.valid, visual, -1),
        num_kept=is_visual.sum(1).astype(jnp.int32),
        num_computed=num_computed,
        visual_attention_value=vav,
    )
