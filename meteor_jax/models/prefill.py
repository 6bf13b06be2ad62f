"""The decoder run segment by segment, with a cut and a cache between.

    layers 0..8   S entries     →  cut: text + K₁ visual   →  layers 8..16   →  cut  →  …
    cache 0       [8, B, S + room]                             cache 1  [8, B, T + K₁ + room]

B examples, T text tokens, S entries, L layers of a segment.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from meteor_jax.models.llama import Llama
from meteor_jax.pruning.decode import (
    cut_scores,
    num_kept,
    query_weights,
    recycle_dropped,
    select_entries,
    take_entries,
    text_raters,
    trace_cut,
)
from meteor_jax.pruning.plan import DecodePlan
from meteor_jax.pruning.select import keep_topk
from meteor_jax.types import Array, CutTrace, SegmentCache, Sequence


@flax.struct.dataclass
class SegmentRun:
    """The sequence as it left the last layer, a cache a segment, and what each cut did."""

    sequence: Sequence
    segments: tuple[SegmentCache, ...]
    cuts: tuple[CutTrace, ...]


@flax.struct.dataclass
class _Segment:
    """One segment's result, padded to the most that its cut may keep."""

    sequence: Sequence
    last_input: Array
    k: Array
    v: Array


def run_segments(
    llama: Llama,
    variables: Any,
    sequence: Sequence,
    *,
    plan: DecodePlan | None,
    num_text: int,
    num_images: Array,
    max_images: int,
    visual_per_image: int,
    num_new: int,
) -> SegmentRun:
    """Runs all layers over a packed sequence, with the cuts of `plan` between them.

    Args:
        num_text: text places of a row; num_images: int32[B]; max_images: M.
        visual_per_image: tokens of one image in `sequence`.
        num_new: room for new tokens in every cache.

    Raises:
        ValueError: if a cut lies outside the decoder or keeps more than there is.
    """
    depth = llama.config.depth
    layers = plan.layers if plan else ()
    if layers and not 0 < layers[0] <= layers[-1] < depth:
        raise ValueError(f"decode.layers={layers} must lie within 1..{depth - 1}.")
    bounds = (0, *layers, depth)
    if layers and sequence.turn is not None:
        raise ValueError(
            "decode: turns that do not see each other share their image's tokens, so no cut can "
            "follow the question of one; train with the plan's stages 1 and 2, or give turn=None."
        )
    raters = None
    if plan and plan.queries == "raters":
        raters = text_raters(sequence, num_text=num_text)
    segment = _run(llama, variables, sequence, start=0, stop=bounds[1])
    segments = [_cache(segment, num_new=num_new)]
    cuts, available = [], visual_per_image
    for cut, start in enumerate(layers):
        if plan.keep[cut] > available:
            raise ValueError(
                f"decode.keep[{cut}]={plan.keep[cut]} but only {available} visual tokens of an "
                "image are left there; lower it."
            )
        buckets = plan.buckets(cut, available=available)
        segment, trace = _cut_and_run(
            llama, variables, segment, plan=plan, cut=cut, start=start, stop=bounds[cut + 2],
            buckets=tuple(size * max_images for size in buckets), num_text=num_text,
            num_images=num_images, max_images=max_images, raters=raters,
            recycling=plan.recycling(cut, available=available),
        )
        available = buckets[-1]
        segments.append(_cache(segment, num_new=num_new))
        cuts.append(trace)
    return SegmentRun(sequence=segment.sequence, segments=tuple(segments), cuts=tuple(cuts))


def new_position(cache: SegmentCache, num_new: Array, *, count: int) -> Array:
    """int32[B, T]: rotary positions of the next `count` tokens in a segment."""
    return cache.next_position[:, None] + num_new + jnp.arange(count)


def _cut_and_run(
    llama: Llama, variables: Any, before: _Segment, *, plan: DecodePlan, cut: int, start: int,
    stop: int, buckets: tuple[int, ...], num_text: int, num_images: Array, max_images: int,
    raters: Array | None, recycling: tuple[int, int],
) -> tuple[_Segment, CutTrace]:
    """Chooses K for every example, then packs the batch into the smallest bucket that holds all:
    each bucket is one branch of a `lax.switch`, so that fewer tokens really cost less time."""
    sequence = before.sequence
    received = None
    if plan.criterion == "text_attention":
        weights = query_weights(sequence, plan=plan, raters=raters)
        num_rows = 1 if plan.queries == "last" else min(num_text, weights.shape[1])
        rows = keep_topk(weights, keep=num_rows).idx
        previous = plan.score_layer == "previous"
        received = llama.apply(
            variables, before.last_input if previous else sequence.x, sequence.position,
            layer=start - 1 if previous else start, rows=rows, rotary=plan.rotary,
            row_weight=jnp.take_along_axis(weights, rows, axis=1), method="text_attention",
        )
    scores, mass, vav = cut_scores(
        sequence, plan=plan, cut=cut, num_images=num_images, received=received, keys=before.k[-1]
    )
    kept = num_kept(mass, sequence, plan=plan, cut=cut, num_images=num_images)
    recycled, clusters = recycling
    if clusters:
        sequence, scores = recycle_dropped(
            sequence, scores, recycled=recycled, clusters=clusters, num_images=num_images,
            max_images=max_images, num_kept=kept,
        )
    length = min(num_text + buckets[-1], scores.shape[1])

    def run(size: int) -> _Segment:
        selection = select_entries(
            sequence, scores, num_kept=kept, num_text=num_text, num_visual=size
        )
        packed = take_entries(sequence, selection, positions=plan.positions)
        return _pad(_run(llama, variables, packed, start=start, stop=stop), length=length)

    # The first bucket that no example's K exceeds.
    index = (kept.max() > jnp.asarray(buckets[:-1], jnp.int32)).sum()
    branches = [lambda size=size: run(size) for size in buckets]
    segment = jax.lax.switch(index, branches)
    bucket = jnp.asarray(buckets, jnp.int32)[index]
    return segment, trace_cut(segment.sequence, capacity=buckets[-1], bucket=bucket, vav=vav)


def _run(llama: Llama, variables: Any, sequence: Sequence, *, start: int, stop: int) -> _Segment:
    out = llama.apply(
        variables, sequence.x, sequence.position, start=start, stop=stop, turn=sequence.turn,
        method="run",
    )
    k, v = out.extras
    return _Segment(sequence.replace(x=out.x), last_input=out.last_input, k=k, v=v)


def _pad(segment: _Segment, *, length: int) -> _Segment:
    """Invalid entries up to `length`, so that every branch returns the same shapes."""
    sequence = segment.sequence
    missing = length - sequence.valid.shape[1]

    def pad(array: Array, *, axis: int = 1, value: int = 0) -> Array:
        widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
        return jnp.pad(array, widths, constant_values=value)

    return _Segment(
        sequence=Sequence(
            x=pad(sequence.x),
            position=pad(sequence.position),
            valid=pad(sequence.valid),
            slot=pad(sequence.slot),
            visual=pad(sequence.visual, value=-1),
        ),
        last_input=pad(segment.last_input),
        k=pad(segment.k, axis=2),
        v=pad(segment.v, axis=2),
    )


def _cache(segment: _Segment, *, num_new: int) -> SegmentCache:
    """The segment's keys and values, and room for `num_new` tokens behind them."""
    sequence = segment.sequence
    count = sequence.valid.sum(1)
    last = jnp.maximum(count - 1, 0)[:, None]
    position = jnp.take_along_axis(sequence.position, last, axis=1)[:, 0] + 1
    room = ((0, 0), (0, 0), (0, num_new), (0, 0), (0, 0))
    return SegmentCache(
        k=jnp.pad(segment.k, room),
        v=jnp.pad(segment.v, room),
        valid=jnp.pad(sequence.valid, ((0, 0), (0, num_new))),
        next_position=position,
        num_room=num_new,
    )
