"""Joining the encoders' tokens, and joining an image's tokens with the text around it.

I images, B examples, M images an example, N visual tokens, T text tokens, S = T + M·N entries of
the joined row (room for a row of text alone), D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import jax
import jax.numpy as jnp

from meteor_jax.models.layers.resize import resize
from meteor_jax.pruning.method import ReductionContext, Span
from meteor_jax.pruning.plan import Step
from meteor_jax.types import IMAGE_TOKEN, Array, Sequence, VisualTokens, take_tokens


def concatenate_sequence(
    projected: Seq[Array],
    patch_indices: Seq[Array],
    *,
    names: Seq[str],
    grids: Seq[int],
    positions: str,
) -> tuple[VisualTokens, tuple[Span, ...]]:
    """Post-projection fusion: the encoders' tokens one after the other.

    Each encoder takes grid² positions, of which a token has its patch index ("original"), or the
    tokens are numbered through ("contiguous").

    Shapes:
        projected: float[I, N_l, D] an encoder; patch_indices: int32[I, N_l].
    """
    offsets, spans, start, offset = [], [], 0, 0
    for name, x, grid in zip(names, projected, grids, strict=True):
        spans.append(Span(encoder=name, start=start, size=x.shape[1], grid=grid))
        offsets.append(offset)
        start += x.shape[1]
        offset += grid**2
    patch_index = jnp.concatenate(patch_indices, axis=1)
    encoder = jnp.concatenate(
        [jnp.full(r.shape, i, jnp.int32) for i, r in enumerate(patch_indices)], axis=1
    )
    tokens = VisualTokens(
        x=jnp.concatenate(projected, axis=1),
        encoder=encoder,
        patch_index=patch_index,
        position=jnp.asarray(offsets, jnp.int32)[encoder] + patch_index,
        span=offset,
    )
    return (tokens if positions == "original" else contiguous_positions(tokens)), tuple(spans)


def contiguous_positions(tokens: VisualTokens) -> VisualTokens:
    """The same tokens with the positions 0, 1, 2, …"""
    place = jnp.arange(tokens.num_tokens, dtype=jnp.int32)
    return tokens.replace(
        position=jnp.broadcast_to(place, tokens.position.shape), span=tokens.num_tokens
    )


def on_common_grid(x: Array) -> VisualTokens:
    """VisualTokens of [I, N, D] whose tokens are on one grid that all encoders share."""
    place = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return VisualTokens(
        x=x, encoder=jnp.zeros_like(place), patch_index=place, position=place, span=x.shape[1]
    )


@jax.named_scope("scores")
def prune_fused(
    tokens: VisualTokens, step: Step, *, spans: tuple[Span, ...], context: ReductionContext
) -> tuple[VisualTokens, tuple[Span, ...], Array | None]:
    """The tokens that a step at fusion leaves, in (encoder, patch) order; which are whose (not
    known statically any more, so all are one encoder's); and what the step adds to the loss.

    Shapes:
        tokens: VisualTokens of [I, N, D]; `spans` say which encoder holds which.

    Raises:
        ValueError: if the budget is larger than N.
    """
    num_tokens, keep = tokens.num_tokens, step.budget.keep
    if keep > num_tokens:
        raise ValueError(
            f"fuse.keep={keep} but only {num_tokens} tokens reach fusion; lower fuse.keep or keep "
            "more inside the encoders."
        )
    context = context.replace(
        keep=keep, available=num_tokens, patch_index=tokens.patch_index, spans=spans
    )
    reduction = step.method.reduce(tokens.x, context=context)
    left = take_tokens(tokens, reduction.idx).replace(x=reduction.x)
    return left, (Span("all", start=0, size=left.num_tokens, grid=0),), reduction.loss


def to_common_grid(features: Seq[Array], *, grids: Seq[int], grid: int) -> list[Array]:
    """Pre-projection fusion, as EAGLE does it: every grid resized to the common one (bilinear,
    aligned corners, float32), so that channels can be joined place by place.

    Shapes:
        features: float[I, grid_l², E_l] an encoder; returns float[I, grid², E_l] an encoder.
    """
    resized = []
    for x, side in zip(features, grids, strict=True):
        square = x.reshape(x.shape[0], side, side, -1)
        resized.append(resize(square, size=grid).reshape(x.shape[0], grid * grid, -1))
    return resized


def splice(
    text: Array,
    *,
    tokens: Array,
    text_valid: Array,
    visual: VisualTokens,
    image_valid: Array,
    segment_ids: Array | None = None,
) -> Sequence:
    """Puts each image's tokens where its `IMAGE_TOKEN` stands, and packs the row.

    For tokens `a <image> b` and two visual tokens the row is `a v₀ v₁ b`, then invalid entries.
    Any mix of examples without, with one and with more images fits one batch.

    Shapes:
        text: float[B, T, D], embeddings; what stands at an `IMAGE_TOKEN` is not used.
        tokens: int32[B, T]; text_valid: bool[B, T]; image_valid: bool[B, M].
        visual: VisualTokens of [B, M, N, D].
        segment_ids: int32[B, T] or None, as in `Batch`; each segment's positions follow those of
            segment 0.
    """
    batch, length = tokens.shape
    num_images, num_visual = visual.x.shape[1:3]
    is_image = (tokens == IMAGE_TOKEN) & text_valid
    ordinal = jnp.cumsum(is_image, axis=1) - 1
    present = jnp.take_along_axis(image_valid, jnp.clip(ordinal, 0, num_images - 1), axis=1)
    present &= is_image & (ordinal < num_images)
    is_text = text_valid & ~is_image

    ends = jnp.cumsum(jnp.where(present, num_visual, is_text), axis=1)
    place = jnp.arange(length + num_images * num_visual)
    text_index = jnp.minimum((ends[:, None, :] <= place[:, None]).sum(-1), length - 1)  # [B, S]

    def at_text(array: Array) -> Array:
        return jnp.take_along_axis(array, text_index, axis=1)

    valid = place < ends[:, -1:]
    visual_here = at_text(present) & valid
    index = at_text(ordinal) * num_visual + place - at_text(ends) + num_visual
    index = jnp.where(visual_here, index, 0)
    flat = num_images * num_visual
    both = jnp.concatenate([text, visual.x.reshape(batch, flat, -1).astype(text.dtype)], axis=1)
    source = jnp.where(visual_here, length + index, text_index)
    width = jnp.where(present, visual.span, is_text)
    positions = jnp.cumsum(width, axis=1)
    if segment_ids is not None:
        begins = jnp.diff(segment_ids, axis=1, prepend=0) > 0
        begin = jax.lax.cummax(jnp.where(begins, positions - width, 0), axis=1)
        shared = jnp.sum(jnp.where(segment_ids == 0, width, 0), axis=1, keepdims=True)
        positions -= jnp.where(segment_ids > 0, begin - shared, 0)
    within = jnp.take_along_axis(visual.position.reshape(batch, flat), index, axis=1)
    return Sequence(
        x=jnp.take_along_axis(both, source[..., None], axis=1),
        position=jnp.where(
            visual_here, at_text(positions) - visual.span + within, at_text(positions) - 1
        ),
        valid=valid,
        text_index=text_index,
        visual=jnp.where(visual_here, index, -1),
        segment_ids=None if segment_ids is None else at_text(segment_ids),
    )


def entry_of_text(sequence: Sequence, *, num_text: int) -> Array:
    """int32[B, T]: the last entry at or before each text place, whose output predicts the text
    token that follows it (for an image: its last visual token)."""
    places = jnp.arange(num_text)
    reached = sequence.valid[:, None, :] & (sequence.text_index[:, None, :] <= places[:, None])
    return jnp.maximum(reached.sum(-1) - 1, 0)
