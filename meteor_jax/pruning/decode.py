"""Stage 3: cuts between layers of the LLM, guided by the text.

B examples, T text tokens, S entries of the packed sequence, H heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from meteor_jax.pruning.plan import DecodePlan
from meteor_jax.pruning.select import Selection, keep_topk
from meteor_jax.types import Array, CutTrace, Sequence


def query_weights(sequence: Sequence, *, plan: DecodePlan) -> Array:
    """float32[B, S]: which entries' attention counts; text only."""
    place = jnp.arange(sequence.valid.shape[1])
    is_text = sequence.is_text
    if plan.queries == "last":
        last = jnp.max(jnp.where(is_text, place, -1), axis=1, keepdims=True)
        return (place == last).astype(jnp.float32)
    last_visual = jnp.max(jnp.where(sequence.is_visual, place, -1), axis=1, keepdims=True)
    return (is_text & (place > last_visual)).astype(jnp.float32)


def visual_attention_value(received: Array, sequence: Sequence) -> Array:
    """float32[B, H]: VAV_h = Σ_i a_{i,h} over the visual tokens.

    Shapes:
        received: float32[B, H, S]; the text's attention to every entry, head by head.
    """
    return jnp.einsum("bhs,bs->bh", received, sequence.is_visual.astype(jnp.float32))


def cut_scores(
    sequence: Sequence, *, plan: DecodePlan, cut: int, received: Array | None, num_images: Array
) -> tuple[Array, Array, Array]:
    """What ranks the visual tokens, and the attention that sets their number.

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
    # "uniform": visual tokens at equal strides among those still there.
    is_visual = sequence.is_visual
    rank = jnp.cumsum(is_visual, axis=1) - 1
    alive = jnp.maximum(is_visual.sum(1, keepdims=True), 1)
    keep = plan.keep[cut] * num_images[:, None]
    stride = jnp.floor((rank + 1) * keep / alive) > jnp.floor(rank * keep / alive)
    return stride.astype(jnp.float32), nothing, nothing[:, None]


def num_kept(
    mass: Array, sequence: Sequence, *, plan: DecodePlan, cut: int, num_images: Array
) -> Array:
    """int32[B]: K of every example, METEOR's λ · Σ VAV, clipped; never more than there are.

    Raises:
        ValueError: if the budget is adaptive and λ was never measured.
    """
    low, high = plan.bounds(cut)
    if plan.budget == "adaptive":
        if len(plan.scale) != len(plan.layers):
            raise ValueError(
                "an adaptive plan needs λ (decode.scale): run `python -m "
                "meteor_jax.tools.calibrate`, or set decode.budget='fixed'."
            )
        per_image = jnp.clip(jnp.round(plan.scale[cut] * mass), low, high).astype(jnp.int32)
    else:
        per_image = jnp.full(mass.shape, high, jnp.int32)
    return jnp.minimum(per_image * num_images, sequence.is_visual.sum(1)).astype(jnp.int32)


def select_entries(
    sequence: Sequence, scores: Array, *, num_kept: Array, num_text: int, num_visual: int
) -> Selection:
    """All text and the `num_kept[b]` best visual tokens, packed into `num_text + num_visual`."""
    return keep_topk(
        jnp.where(sequence.is_text, jnp.inf, scores),
        keep=min(num_text + num_visual, scores.shape[1]),
        valid=sequence.valid,
        num_keep=sequence.is_text.sum(1) + num_kept,
    )


def take_entries(
    sequence: Sequence, selection: Selection, *, positions: str = "original"
) -> Sequence:
    """The sequence that is left; "renumber" gives the kept entries the positions 0, 1, 2, …"""

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, selection.idx, axis=1)

    position = take(sequence.position)
    if positions == "renumber":
        position = jnp.broadcast_to(jnp.arange(position.shape[1]), position.shape)
    return Sequence(
        x=jnp.take_along_axis(sequence.x, selection.idx[..., None], axis=1),
        position=position,
        valid=selection.valid,
        slot=take(sequence.slot),
        visual=take(sequence.visual),
    )


def trace_cut(
    sequence: Sequence, *, capacity: int, bucket: Array, vav: Array
) -> CutTrace:
    """The `CutTrace` of the sequence that a cut left; `capacity` visual tokens at most."""
    is_visual = sequence.is_visual
    capacity = min(capacity, is_visual.shape[1])
    first = keep_topk(jnp.zeros(is_visual.shape), keep=capacity, valid=is_visual)
    visual = jnp.take_along_axis(sequence.visual, first.idx, axis=1)
    return CutTrace(
        visual=jnp.where(first.valid, visual, -1),
        num_kept=is_visual.sum(1).astype(jnp.int32),
        bucket=bucket,
        visual_attention_value=vav,
    )
