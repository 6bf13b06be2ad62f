"""The arrays that travel between rooms.

Axis letters, used in every file: B examples, M images an example, I images, H W pixels, N visual
tokens, T text tokens, S tokens of a whole sequence, D model width, E encoder width, V vocabulary,
L layers, K kept tokens.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

IMAGE_TOKEN = -200  # stands in the text where an image's tokens go (LLaVA's number)
IGNORE_LABEL = -100  # a position that takes no part in the loss


@flax.struct.dataclass
class Batch:
    """What the data pipeline gives and every model function takes. Rows are padded on the right.

    Shapes:
        images: uint8[B, M, H, W, 3], raw RGB; an absent image is all zeros.
        image_valid: bool[B, M]; present images come first. `image_valid.sum(1)` equals the number
            of `IMAGE_TOKEN`s in the row.
        tokens: int32[B, T]; text ids, with `IMAGE_TOKEN` at each image's place.
        text_valid: bool[B, T]; False on padding.
        labels: int32[B, T]; `labels[t] == tokens[t]` where token t is to be predicted (from what
            stands before it), `IGNORE_LABEL` elsewhere.
        example_id: int32[B]; the row in its data source, for error messages and predictions.
        segment_ids: int32[B, T]; 0 for what all questions of a row see, which comes first, then
            the number of the question, whose tokens see segment 0 and their own segment, at the
            positions that they would have alone. None where every token sees all before it.
        target: int32[B]; of the task "classification" the index of the answer in `data.classes`,
            −1 where there is none. None for other tasks.
    """

    images: Array
    image_valid: Array
    tokens: Array
    text_valid: Array
    labels: Array
    example_id: Array
    segment_ids: Array | None = None
    target: Array | None = None


@flax.struct.dataclass
class VisualTokens:
    """Tokens of one image, from one encoder or from all of them joined.

    Shapes:
        x: float[..., N, D].
        encoder: int32[..., N]; which of the encoders that ran a token
            comes from, in the model's order.
        patch_index: int32[..., N]; its row-major place in that encoder's own output grid.
        position: int32[..., N]; its place within the span that the image takes in the sequence.
        span: how many positions an image takes (static).
    """

    x: Array
    encoder: Array
    patch_index: Array
    position: Array
    span: int = flax.struct.field(pytree_node=False)

    @property
    def num_tokens(self) -> int:
        return self.x.shape[-2]


@flax.struct.dataclass
class Sequence:
    """Text and visual tokens in one packed row: entries in reading order, invalid ones last.

    Shapes:
        x: float[B, S, D].
        position: int32[B, S]; the rotary position.
        valid: bool[B, S].
        text_index: int32[B, S]; place in the row of text tokens, for a visual token that of its
            `IMAGE_TOKEN`; it never decreases along the valid entries.
        visual: int32[B, S]; index into the row's M·N visual tokens, −1 for a text token.
        segment_ids: int32[B, S] or None, as in `Batch`.
    """

    x: Array
    position: Array
    valid: Array
    text_index: Array
    visual: Array
    segment_ids: Array | None = None

    @property
    def is_visual(self) -> Array:
        """bool[B, S]."""
        return self.valid & (self.visual >= 0)

    @property
    def is_text(self) -> Array:
        """bool[B, S]."""
        return self.valid & (self.visual < 0)


@flax.struct.dataclass
class RangeCache:
    """Keys and values of the layers between two prune steps of the decoder; prompt first, then room
    for new tokens.

    Shapes:
        k, v: float[L, B, S, num_kv_heads, head_dim], keys already rotated.
        valid: bool[B, S].
        next_position: int32[B]; rotary position of the first new token in this range.
        decode_capacity: entries at the end of S that are for new tokens (static).
        lengths: static numbers of prompt entries, increasing, that `trim` may leave; the last
            holds any prompt, the others hold those that kept fewer tokens.
    """

    k: Array
    v: Array
    valid: Array
    next_position: Array
    decode_capacity: int = flax.struct.field(pytree_node=False)
    lengths: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def trim(self, length: int) -> RangeCache:
        """Without the prompt entries from `length` on, which no row may fill."""
        prompt = self.valid.shape[1] - self.decode_capacity
        if length == prompt:
            return self

        def cut(array: Array, axis: int) -> Array:
            kept = jax.lax.slice_in_dim(array, 0, length, axis=axis)
            room = jax.lax.slice_in_dim(array, prompt, None, axis=axis)
            return jnp.concatenate([kept, room], axis=axis)

        return self.replace(
            k=cut(self.k, 2), v=cut(self.v, 2), valid=cut(self.valid, 1), lengths=(length,)
        )

    def append(self, k: Array, v: Array, *, cache_index: Array) -> RangeCache:
        """Writes keys and values float[L, B, T, num_kv_heads, head_dim] of T more tokens, after
        the `cache_index` that came since the prefill. All rows write at one place, so nothing is
        scattered. Where there is no room for them nothing changes."""
        count, capacity = k.shape[2], self.decode_capacity
        fits = cache_index + count <= capacity
        start = self.valid.shape[1] - capacity + jnp.minimum(cache_index, capacity - count)

        def write(array: Array, new: Array, axis: int) -> Array:
            # The few entries that are there stay where nothing fits; the rest is not touched.
            old = jax.lax.dynamic_slice_in_dim(array, start, count, axis=axis)
            new = jnp.where(fits, new.astype(array.dtype), old)
            return jax.lax.dynamic_update_slice_in_dim(array, new, start, axis=axis)

        added = jnp.ones((self.valid.shape[0], count), bool)
        return self.replace(
            k=write(self.k, k, 2), v=write(self.v, v, 2), valid=write(self.valid, added, 1)
        )


@flax.struct.dataclass
class DecodeCache:
    """One `RangeCache` a range of layers.

    Shapes:
        cache_index: int32[]; tokens appended since the prefill.
        overflowed: bool[]; whether tokens came for which there was no room. They were not
            written, and their logits are NaN.
    """

    ranges: tuple[RangeCache, ...]
    cache_index: Array
    overflowed: Array

    @property
    def decode_capacity(self) -> int:
        """New tokens that there was room for after the prefill."""
        return self.ranges[0].decode_capacity

    @property
    def num_lengths(self) -> int:
        """Static lengths that `trim` chooses among."""
        return max(len(part.lengths) for part in self.ranges)

    def trim(self, choice: int) -> DecodeCache:
        """Every range cut to its `choice`-th length (static), or its last."""
        return self.replace(
            ranges=tuple(
                part.trim(part.lengths[min(choice, len(part.lengths) - 1)]) for part in self.ranges
            )
        )


@flax.struct.dataclass
class EncodeTrace:
    """Which of an encoder's tokens were left after each segment: int32[I, K] patch indices."""

    kept: tuple[Array, ...]


@flax.struct.dataclass
class PruneStepTrace:
    """What one prune step in the decoder did.

    Shapes:
        visual: int32[B, K_max]; kept visual tokens (indices into M·N), −1 where none.
        num_kept: int32[B]; visual tokens kept for the example.
        num_computed: float32[B]; visual tokens that the layers after the step computed for it: its
            share of the static total that its batch was packed into.
        budget_signal: float32[B]; what an adaptive budget multiplies with λ (METEOR: the visual
            attention values of the heads that count, summed), 0 where the method gives none.
    """

    visual: Array
    num_kept: Array
    num_computed: Array
    budget_signal: Array


@flax.struct.dataclass
class PruneTrace:
    """Everything that pruning decided, for counting, logging and drawing.

    Shapes:
        encode: by encoder, its `EncodeTrace`.
        fused_encoder, fused_patch_index: int32[I, N]; the tokens that left fusion.
        prune_steps: one `PruneStepTrace` a step in the decoder; empty in training.
        loss: float32[I] or None; what methods add to the training loss.
    """

    encode: dict[str, EncodeTrace]
    fused_encoder: Array
    fused_patch_index: Array
    prune_steps: tuple[PruneStepTrace, ...] = ()
    loss: Array | None = None


def take_tokens(tokens: VisualTokens, idx: Array) -> VisualTokens:
    """The tokens at `idx` (int32[..., K]) along the token axis."""

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, idx, axis=-1)

    return tokens.replace(
        x=jnp.take_along_axis(tokens.x, idx[..., None], axis=-2),
        encoder=take(tokens.encoder),
        patch_index=take(tokens.patch_index),
        position=take(tokens.position),
    )
