"""The decoder run from one prune step to the next, with a cache for each range of layers.

    layers 0..8   S entries     →  step: text + K₁ visual   →  layers 8..16   →  step  →  …
    cache 0       [8, B, S + room]                              cache 1  [8, B, T + K₁ + room]

Under an adaptive budget every row keeps another number of tokens. The rows are then in buffers of
one of a few static sizes (`ragged`), whichever holds what they keep together, so that the layers
cost what the rows of a batch need on average.

B examples, T text tokens, S entries, L layers of a range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from meteor_jax.models.decoders.llama.caches import HeldRange, LayerRange
from meteor_jax.models.decoders.llama.layer_runs import run_layers, run_rows
from meteor_jax.models.decoders.llama.model import Llama
from meteor_jax.models.layers.ragged import num_row_shards
from meteor_jax.pruning.budgets import steps_that_drop
from meteor_jax.pruning.method import Reduction, ReductionContext, gather
from meteor_jax.pruning.ops.select import keep_topk
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.types import Array, PruneStepTrace, RangeCache, Sequence


class DecoderRun(flax.struct.PyTreeNode):
    """The sequence as it left the last layer, a cache a range of layers, and what each step did."""

    sequence: Sequence
    ranges: tuple[RangeCache, ...]
    prune_steps: tuple[PruneStepTrace, ...]


def run_decoder(
    llama: Llama,
    variables: Any,
    sequence: Sequence,
    *,
    plan: PrunePlan,
    num_text: int,
    num_images: Array,
    max_images: int,
    visual_per_image: int,
    decode_capacity: int,
    learned: Mapping[str, Any] | None = None,
) -> DecoderRun:
    """Runs all layers over a packed sequence, with the prune steps of a plan between them.

    A step that can drop nothing is none: its layers belong to the range before.

    Args:
        plan: its steps in the decoder, and where visual tokens enter it.
        num_text: text places of a row; num_images: int32[B]; max_images: M.
        visual_per_image: tokens of one image in `sequence`.
        decode_capacity: room for new tokens in every cache.
        learned: parameters of methods that have their own, by name.

    Raises:
        ValueError: if a step is outside the decoder or keeps more than there is.
    """
    depth, steps, layers = llama.config.depth, plan.decoder_steps, plan.decoder_layers
    if plan.enter_at >= depth:
        raise ValueError(f"enter_at={plan.enter_at} must be within 0..{depth - 1}.")
    if layers and not 0 < layers[0] <= layers[-1] < depth:
        raise ValueError(f"decode.layers={layers} must be within 1..{depth - 1}.")
    if layers and sequence.segment_ids is not None:
        raise ValueError(
            "decode: independent questions share their image's tokens, so nothing can be pruned by "
            "the question of one; train with the plan's other steps, or give segment_ids=None."
        )
    dropping = steps_that_drop([step.budget for step in steps], available=visual_per_image)
    context = ReductionContext(
        sequence=sequence,
        num_images=num_images,
        num_text=num_text,
        max_images=max_images,
        available=visual_per_image,
        learned=learned,
    )
    held: list[HeldRange] = []
    if plan.enter_at:
        sequence, alone = _text_alone(
            llama, variables, sequence, stop=plan.enter_at, num_text=num_text
        )
        held.append(HeldRange.of(alone, row=sequence, lengths={num_text}))
    with jax.named_scope("scores"):
        states = {steps[i].method: steps[i].method.begin(context=context) for i in dropping}
    bounds = (plan.enter_at, *(layers[i] for i in dropping), depth)
    done = run_layers(llama, variables, sequence, start=plan.enter_at, stop=bounds[1])
    held.append(HeldRange.of(done, row=sequence, lengths={done.k.shape[2]}))
    traces: list[PruneStepTrace] = []
    for index, step in enumerate(steps):
        if index not in dropping:
            traces.append(traces[-1] if traces else _trace_of_all(done.sequence, context))
            continue
        context = context.replace(
            sequence=done.sequence,
            keep=step.budget.keep,
            index=index,
            state=states[step.method],
        )
        start, stop = bounds[dropping.index(index) + 1 :][:2]
        with jax.named_scope(f"prune_{index}"):
            done, trace, reduction = _prune_and_run(
                llama, variables, done, step=step, context=context, start=start, stop=stop
            )
        if reduction.state is not None:
            states[step.method] = reduction.state
        traces.append(trace)
        lengths = {
            num_text + max_images * length
            for length in step.budget.cache_lengths(available=context.available)
        }
        context = context.replace(available=min(step.budget.bounds[1], context.available))
        new = HeldRange.of(done, row=done.sequence, lengths=lengths)
        entered = held[plan.enter_at > 0 :]  # those that hold visual tokens
        entered = [earlier.follow(reduction.idx) for earlier in entered]
        if step.cut_caches:
            entered = [e.cut(new.valid, lengths=new.lengths) for e in entered]
        held = [*held[: plan.enter_at > 0], *entered, new]
    return DecoderRun(
        sequence=done.sequence,
        ranges=tuple(layers.cache(capacity=decode_capacity) for layers in held),
        prune_steps=tuple(traces),
    )


def _text_alone(
    llama: Llama, variables: Any, sequence: Sequence, *, stop: int, num_text: int
) -> tuple[Sequence, LayerRange]:
    """Layers `[0, stop)` over the text, packed; also the whole row with what they made of it."""
    is_text = sequence.is_text
    selection = keep_topk(is_text, keep=min(num_text, is_text.shape[1]), valid=is_text)
    text = pack_entries(sequence, gather(sequence.x, selection))
    done = run_layers(llama, variables, text, start=0, stop=stop)
    place = jnp.maximum(jnp.cumsum(is_text, axis=1) - 1, 0)
    ran = jnp.take_along_axis(done.sequence.x, place[..., None], axis=1)
    return sequence.replace(x=jnp.where(is_text[..., None], ran, sequence.x)), done


def _prune_and_run(
    llama: Llama,
    variables: Any,
    before: LayerRange,
    *,
    step: Step,
    context: ReductionContext,
    start: int,
    stop: int,
) -> tuple[LayerRange, PruneStepTrace, Reduction]:
    """Chooses K for every example, packs each row, and runs the layers up to the next step over
    the smallest static total that holds what the rows keep: a branch of a `lax.switch` each."""
    sequence, method, budget = before.sequence, step.method, step.budget
    if "attention_received" in method.needs:
        received = _attention_received(
            llama, variables, before, step=step, context=context, start=start
        )
        context = context.replace(attention_received=received)
    if "keys" in method.needs:
        context = context.replace(keys=before.k[-1])
    with jax.named_scope("scores"):
        ranking = method.rank(sequence.x, context=context)
    kept = budget.num_kept(
        ranking.budget_signal,
        num_images=context.num_images,
        available=sequence.is_visual.sum(1),
    )
    rows = kept.shape[0] // num_row_shards(kept.shape[0])
    totals = budget.totals(rows=rows * context.max_images, available=context.available)
    capacity = totals[-1] // rows
    context = context.replace(num_kept=kept, capacity=capacity)
    with jax.named_scope("scores"):
        reduction = method.select(sequence.x, ranking.scores, context=context)
    packed = pack_entries(sequence, reduction, positions=step.positions)
    after, computed = run_rows(
        llama,
        variables,
        packed,
        num_kept=kept,
        totals=totals,
        num_text=context.num_text,
        start=start,
        stop=stop,
    )
    trace = trace_step(
        packed, capacity=capacity, signal=ranking.budget_signal, num_computed=computed
    )
    return after, trace, reduction


def pack_entries(
    sequence: Sequence, reduction: Reduction, *, positions: str = "original"
) -> Sequence:
    """The sequence that a step leaves; "contiguous" gives its entries the positions 0, 1, 2, …"""

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, reduction.idx, axis=1)

    position = take(sequence.position)
    if positions == "contiguous":
        position = jnp.broadcast_to(jnp.arange(position.shape[1]), position.shape)
    return Sequence(
        x=reduction.x,
        position=position,
        valid=reduction.valid,
        text_index=take(sequence.text_index),
        visual=take(sequence.visual),
        segment_ids=None if sequence.segment_ids is None else take(sequence.segment_ids),
    )


def trace_step(
    sequence: Sequence, *, capacity: int, num_computed: Array, signal: Array | None = None
) -> PruneStepTrace:
    """The trace of the sequence that a step left; `capacity` visual tokens at most."""
    is_visual = sequence.is_visual
    capacity = min(capacity, is_visual.shape[1])
    first = keep_topk(jnp.zeros(is_visual.shape), keep=capacity, valid=is_visual)
    visual = jnp.take_along_axis(sequence.visual, first.idx, axis=1)
    return PruneStepTrace(
        visual=jnp.where(first.valid, visual, -1),
        num_kept=is_visual.sum(1).astype(jnp.int32),
        num_computed=num_computed,
        budget_signal=jnp.zeros(len(visual)) if signal is None else signal,
    )


def _trace_of_all(sequence: Sequence, context: ReductionContext) -> PruneStepTrace:
    """The trace of a step that drops nothing: all that came."""
    capacity = context.max_images * context.available
    computed = jnp.full((len(sequence.valid),), capacity, jnp.float32)
    return trace_step(sequence, capacity=capacity, num_computed=computed)


@jax.named_scope("scores")
def _attention_received(
    llama: Llama,
    variables: Any,
    before: LayerRange,
    *,
    step: Step,
    context: ReductionContext,
    start: int,
) -> Array:
    """float32[B, H, S]: what each entry receives from the queries that count.

    The keys are those in the cache where these are what the method asks for.
    """
    sequence, method = before.sequence, step.method
    weights = method.query_weights(context=context)
    num_rows = min(method.max_queries(context.num_text), weights.shape[1])
    rows = keep_topk(weights, keep=num_rows).idx
    previous = method.score_layer == "previous"
    x, layer = (before.last_input, start - 1) if previous else (sequence.x, start)
    if previous and method.rotary == "with":
        keys = before.k[-1]
    else:
        keys = llama.apply(
            variables, x, sequence.position, layer=layer, rotary=method.rotary, method="keys"
        )
    return llama.apply(
        variables,
        jnp.take_along_axis(x, rows[..., None], axis=1),
        jnp.take_along_axis(sequence.position, rows, axis=1),
        keys,
        layer=layer,
        rows=rows,
        rotary=method.rotary,
        row_weight=jnp.take_along_axis(weights, rows, axis=1),
        method="text_attention",
    )
