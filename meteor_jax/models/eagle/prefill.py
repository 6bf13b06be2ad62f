"""The decoder run segment by segment, with a cut and a cache between.

    layers 0..8   S entries     →  cut: text + K₁ visual   →  layers 8..16   →  cut  →  …
    cache 0       [8, B, S + room]                             cache 1  [8, B, T + K₁ + room]

Under an adaptive budget every row keeps another number of tokens. The rows then lie in buffers of
one of a few static sizes (`ragged`), whichever holds what they keep together, so that a segment
costs what the rows of a batch need on average.

B examples, T text tokens, S entries, L layers of a segment.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from meteor_jax.models.decoders.llama.model import Llama, rotary_tables
from meteor_jax.models.layers.ragged import RaggedLayout, num_row_shards
from meteor_jax.pruning.decode import (
    cut_scores,
    num_kept,
    query_weights,
    recycle_dropped,
    select_entries,
    take_entries,
    text_query_mask,
    trace_cut,
)
from meteor_jax.pruning.ops.select import keep_topk
from meteor_jax.pruning.plan import DecodePlan
from meteor_jax.types import Array, CutTrace, SegmentCache, Sequence


@flax.struct.dataclass
class SegmentRun:
    """The sequence as it left the last layer, a cache a segment, and what each cut did."""

    sequence: Sequence
    segments: tuple[SegmentCache, ...]
    cuts: tuple[CutTrace, ...]


@flax.struct.dataclass
class Segment:
    """One segment's result: `last_input` is its last layer's, float[B, S, D]."""

    sequence: Sequence
    last_input: Array
    k: Array
    v: Array


@flax.struct.dataclass
class _Row:
    """How many entries a row has, at most: all static.

    Attributes:
        num_text: places of its text. max_images: places of its images.
        available: visual tokens of an image that reach the next cut.
    """

    num_text: int = flax.struct.field(pytree_node=False)
    max_images: int = flax.struct.field(pytree_node=False)
    available: int = flax.struct.field(pytree_node=False)

    def length(self, num_visual: int) -> int:
        """Entries of a row with so many visual tokens an image."""
        return self.num_text + self.max_images * num_visual


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

    A cut that can drop nothing is no cut: its layers belong to the segment before.

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
    if layers and sequence.segment_ids is not None:
        raise ValueError(
            "decode: independent questions share their image's tokens, so nothing can be pruned by "
            "the question of one; train with the plan's stages 1 and 2, or give segment_ids=None."
        )
    raters = None
    if plan and plan.queries == "raters":
        raters = text_query_mask(sequence, num_text=num_text)
    row = _Row(num_text=num_text, max_images=max_images, available=visual_per_image)
    drops = plan.cuts_that_drop(available=visual_per_image) if plan else ()
    bounds = (0, *(layers[cut] for cut in drops), depth)
    segment = _run(llama, variables, sequence, start=0, stop=bounds[1])
    segments = [_cache(segment, num_new=num_new, lengths=(segment.k.shape[2],))]
    cuts: list[CutTrace] = []
    for cut in range(len(layers)):
        if cut not in drops:
            cuts.append(_trace_of_none(cuts, segment.sequence, row))
            continue
        start, stop = bounds[drops.index(cut) + 1 :][:2]
        with jax.named_scope(f"prune_{cut}"):
            segment, trace = _cut_and_run(
                llama,
                variables,
                segment,
                plan=plan,
                cut=cut,
                start=start,
                stop=stop,
                row=row,
                num_images=num_images,
                raters=raters,
            )
        cuts.append(trace)
        longest = segment.k.shape[2]
        lengths = plan.cache_lengths(cut, available=row.available)
        row = row.replace(available=min(plan.bounds(cut)[1], row.available))
        lengths = sorted({min(row.length(length), longest) for length in lengths})
        segments.append(_cache(segment, num_new=num_new, lengths=tuple(lengths)))
    return SegmentRun(sequence=segment.sequence, segments=tuple(segments), cuts=tuple(cuts))


def new_position(cache: SegmentCache, num_new: Array, *, count: int) -> Array:
    """int32[B, T]: rotary positions of the next `count` tokens in a segment."""
    return cache.next_position[:, None] + num_new + jnp.arange(count)


def _cut_and_run(
    llama: Llama,
    variables: Any,
    before: Segment,
    *,
    plan: DecodePlan,
    cut: int,
    start: int,
    stop: int,
    row: _Row,
    num_images: Array,
    raters: Array | None,
) -> tuple[Segment, CutTrace]:
    """Chooses K for every example, packs each row, and runs the layers up to the next cut over
    the smallest static total that holds what the rows keep: a branch of a `lax.switch` each."""
    sequence = before.sequence
    received = None
    if plan.criterion == "text_attention":
        received = _text_attention(
            llama, variables, before, plan=plan, start=start, num_text=row.num_text, raters=raters
        )
    scores, mass, vav = cut_scores(
        sequence, plan=plan, cut=cut, num_images=num_images, received=received, keys=before.k[-1]
    )
    kept = num_kept(mass, sequence, plan=plan, cut=cut, num_images=num_images)
    recycled, clusters = plan.recycling(cut, available=row.available)
    if clusters:
        sequence, scores = recycle_dropped(
            sequence,
            scores,
            recycled=recycled,
            clusters=clusters,
            num_images=num_images,
            max_images=row.max_images,
            num_kept=kept,
        )
    rows = kept.shape[0] // num_row_shards(kept.shape[0])
    totals = plan.totals(cut, rows=rows * row.max_images, available=row.available)
    capacity = totals[-1] // rows
    selection = select_entries(
        sequence, scores, num_kept=kept, num_text=row.num_text, num_visual=capacity
    )
    packed = take_entries(sequence, selection, positions=plan.positions)
    segment, computed = run_rows(
        llama,
        variables,
        packed,
        num_kept=kept,
        totals=totals,
        num_text=row.num_text,
        start=start,
        stop=stop,
    )
    return segment, trace_cut(packed, capacity=capacity, vav=vav, num_computed=computed)


def run_rows(
    llama: Llama,
    variables: Any,
    sequence: Sequence,
    *,
    num_kept: Array,
    totals: tuple[int, ...],
    num_text: int,
    start: int,
    stop: int,
) -> tuple[Segment, Array]:
    """Layers `[start, stop)` over packed rows, over the smallest total that holds them.

    Args:
        num_kept: int32[B], visual tokens of every row.
        totals: static numbers of visual tokens of a shard's rows together, increasing; the last
            holds any.
        num_text: text places of a row.

    Returns:
        The segment, and float32[B]: visual tokens computed, a row's share of the total.
    """
    num_shards = num_row_shards(num_kept.shape[0])
    rows = num_kept.shape[0] // num_shards
    # The first total that no shard's rows exceed together: the same on all shards, because the
    # branches gather parameters.
    needed = num_kept.reshape(num_shards, -1).sum(1).max()
    index = (needed > jnp.asarray(totals[:-1], jnp.int32)).sum()
    segment = _run_packed(
        llama,
        variables,
        sequence,
        start=start,
        stop=stop,
        index=index,
        num_buffers=num_shards,
        sizes=tuple(rows * num_text + total for total in totals),
    )
    computed = jnp.asarray(totals, jnp.float32)[index] / rows
    return segment, jnp.broadcast_to(computed, num_kept.shape)


@jax.named_scope("scores")
def _text_attention(
    llama: Llama,
    variables: Any,
    before: Segment,
    *,
    plan: DecodePlan,
    start: int,
    num_text: int,
    raters: Array | None,
) -> Array:
    """float32[B, H, S]: what each entry receives from the text rows that count.

    The keys are those in the cache where these are what the plan asks for.
    """
    sequence = before.sequence
    weights = query_weights(sequence, plan=plan, raters=raters)
    num_rows = 1 if plan.queries == "last" else min(num_text, weights.shape[1])
    rows = keep_topk(weights, keep=num_rows).idx
    previous = plan.score_layer == "previous"
    x, layer = (before.last_input, start - 1) if previous else (sequence.x, start)
    if previous and plan.rotary == "with":
        keys = before.k[-1]
    else:
        keys = llama.apply(
            variables, x, sequence.position, layer=layer, rotary=plan.rotary, method="keys"
        )
    return llama.apply(
        variables,
        jnp.take_along_axis(x, rows[..., None], axis=1),
        jnp.take_along_axis(sequence.position, rows, axis=1),
        keys,
        layer=layer,
        rows=rows,
        rotary=plan.rotary,
        row_weight=jnp.take_along_axis(weights, rows, axis=1),
        method="text_attention",
    )


def _run(llama: Llama, variables: Any, sequence: Sequence, *, start: int, stop: int) -> Segment:
    """Layers `[start, stop)`, every row by itself."""
    out = llama.apply(
        variables,
        sequence.x,
        sequence.position,
        start=start,
        stop=stop,
        segment_ids=sequence.segment_ids,
        method="run",
    )
    k, v = out.extras
    return Segment(sequence.replace(x=out.x), last_input=out.last_input, k=k, v=v)


def _run_packed(
    llama: Llama,
    variables: Any,
    sequence: Sequence,
    *,
    start: int,
    stop: int,
    index: Array,
    sizes: tuple[int, ...],
    num_buffers: int,
) -> Segment:
    """Layers `[start, stop)`, the rows in buffers of `sizes[index]` entries, which hold them."""
    batch, longest = sequence.valid.shape
    if len(sizes) == 1:
        return _run(llama, variables, sequence, start=start, stop=stop)
    layout, x, position = None, sequence.x, sequence.position  # the same for all sizes
    if batch > num_buffers:  # else a row is its buffer
        layout = RaggedLayout.pack(sequence.valid.sum(1), longest=longest, num_buffers=num_buffers)
        x, position = layout.to_buffers(x), layout.to_buffers(position)

    cos, sin = rotary_tables(position, config=llama.config)

    def run(size: int) -> tuple[Array, ...]:
        size = min(size, x.shape[1])
        with jax.named_scope(f"entries_{size}"):
            out = llama.apply(
                variables,
                x[:, :size],
                (cos[:, :size], sin[:, :size]),
                start=start,
                stop=stop,
                layout=layout and layout.shrink(size),
                method="run",
            )
        k, v = out.extras
        states = (_pad(array, x.shape[1], axis=1) for array in (out.x, out.last_input))
        return *states, _pad(k, longest, axis=2), _pad(v, longest, axis=2)

    x, last_input, k, v = jax.lax.switch(index, [lambda size=size: run(size) for size in sizes])
    if layout is not None:
        x, last_input = layout.to_rows(x), layout.to_rows(last_input)
    return Segment(sequence.replace(x=x), last_input=last_input, k=k, v=v)


def _pad(array: Array, length: int, *, axis: int) -> Array:
    widths = [(0, length - array.shape[i] if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths)


def _trace_of_none(cuts: list[CutTrace], sequence: Sequence, row: _Row) -> CutTrace:
    """The trace of a cut that drops nothing: all that came."""
    if cuts:
        return cuts[-1]
    capacity = row.max_images * row.available
    batch = len(sequence.valid)
    return trace_cut(
        sequence,
        capacity=capacity,
        vav=jnp.zeros((batch, 1)),
        num_computed=jnp.full((batch,), capacity, jnp.float32),
    )


def _cache(segment: Segment, *, num_new: int, lengths: tuple[int, ...]) -> SegmentCache:
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
        decode_capacity=num_new,
        lengths=lengths,
    )
