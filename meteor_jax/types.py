"""The arrays that cross packages.

Axis letters, used in every file: B examples, M images an example, I images, H W pixels, N visual
tokens, T text tokens, S tokens of a whole sequence, D model width, E encoder width, V vocabulary,
L layers, K kept tokens. Shapes are types (jaxtyping); tests check them.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int32, UInt8

Array = jax.Array
AnyArray = Any  # of JAX in a model, of NumPy on the host, or a ShapeDtypeStruct

IMAGE_TOKEN = -200  # stands in the text where an image's tokens go (LLaVA's number)
IGNORE_LABEL = -100  # a position that takes no part in the loss


class Batch(flax.struct.PyTreeNode):
    """What the data pipeline gives and every model function takes. Rows are padded on the right.

    Attributes:
        images: raw RGB; an absent image is all zeros.
        image_valid: present images come first. `image_valid.sum(1)` equals the number of
            `IMAGE_TOKEN`s in the row.
        tokens: text ids, with `IMAGE_TOKEN` at each image's place.
        text_valid: False on padding.
        labels: `labels[t] == tokens[t]` where token t is to be predicted (from what stands before
            it), `IGNORE_LABEL` elsewhere.
        example_id: the row in its data source, for error messages and predictions.
        segment_ids: 0 for what all questions of a row see, which comes first, then the number of
            the question, whose tokens see segment 0 and their own segment, at the positions that
            they would have alone. None where every token sees all before it.
        target: of the task "classification" the index of the answer in `data.classes`, −1 where
            there is none. None for other tasks.
    """

    images: UInt8[AnyArray, "B M H W 3"]
    image_valid: Bool[AnyArray, "B M"]
    tokens: Int32[AnyArray, "B T"]
    text_valid: Bool[AnyArray, "B T"]
    labels: Int32[AnyArray, "B T"]
    example_id: Int32[AnyArray, " B"]
    segment_ids: Int32[AnyArray, "B T"] | None = None
    target: Int32[AnyArray, " B"] | None = None


class VisualTokens(flax.struct.PyTreeNode):
    """Tokens of one image, from one encoder or from all of them joined.

    Attributes:
        encoder: which of the encoders that ran a token comes from, in the model's order.
        patch_index: its row-major place in that encoder's own output grid.
        position: its place within the span that the image takes in the sequence.
        span: how many positions an image takes (static).
    """

    x: Float[AnyArray, "*batch N D"]
    encoder: Int32[AnyArray, "*batch N"]
    patch_index: Int32[AnyArray, "*batch N"]
    position: Int32[AnyArray, "*batch N"]
    span: int = flax.struct.field(pytree_node=False)

    @property
    def num_tokens(self) -> int:
        return self.x.shape[-2]


class Sequence(flax.struct.PyTreeNode):
    """Text and visual tokens in one packed row: entries in reading order, invalid ones last.

    Attributes:
        position: the rotary position.
        text_index: place in the row of text tokens, for a visual token that of its `IMAGE_TOKEN`;
            it never decreases along the valid entries.
        visual: index into the row's M·N visual tokens, −1 for a text token.
        segment_ids: as in `Batch`.
    """

    x: Float[AnyArray, "B S D"]
    position: Int32[AnyArray, "B S"]
    valid: Bool[AnyArray, "B S"]
    text_index: Int32[AnyArray, "B S"]
    visual: Int32[AnyArray, "B S"]
    segment_ids: Int32[AnyArray, "B S"] | None = None

    @property
    def is_visual(self) -> Array:
        """bool[B, S]."""
        return self.valid & (self.visual >= 0)

    @property
    def is_text(self) -> Array:
        """bool[B, S]."""
        return self.valid & (self.visual < 0)


class RangeCache(flax.struct.PyTreeNode):
    """Keys and values of the layers between two prune steps of the decoder; prompt first, then room
    for new tokens.

    Attributes:
        k, v: keys, already rotated, and values.
        next_position: rotary position of the first new token in this range.
        decode_capacity: entries at the end of S that are for new tokens (static).
        lengths: static numbers of prompt entries, increasing, that `trim` may leave; the last
            holds any prompt, the others hold those that kept fewer tokens.
    """

    k: Float[AnyArray, "L B S num_kv_heads head_dim"]
    v: Float[AnyArray, "L B S num_kv_heads head_dim"]
    valid: Bool[AnyArray, "B S"]
    next_position: Int32[AnyArray, " B"]
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


class DecodeCache(flax.struct.PyTreeNode):
    """One `RangeCache` a range of layers.

    Attributes:
        cache_index: tokens appended since the prefill.
        overflowed: whether tokens came for which there was no room. They were not written, and
            their logits are NaN.
    """

    ranges: tuple[RangeCache, ...]
    cache_index: Int32[AnyArray, ""]
    overflowed: Bool[AnyArray, ""]

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


class EncodeTrace(flax.struct.PyTreeNode):
    """Which of an encoder's tokens were left after each segment, as patch indices."""

    kept: tuple[Int32[AnyArray, "I _"], ...]


class PruneStepTrace(flax.struct.PyTreeNode):
    """What one prune step in the decoder did.

    Attributes:
        visual: kept visual tokens (indices into M·N), −1 where none.
        num_kept: visual tokens kept for the example.
        num_computed: visual tokens that the layers after the step computed for it: its share of
            the static total that its batch was packed into.
        budget_signal: what an adaptive budget multiplies with λ (METEOR: the visual attention
            values of the heads that count, summed), 0 where the method gives none.
    """

    visual: Int32[AnyArray, "B K"]
    num_kept: Int32[AnyArray, " B"]
    num_computed: Float32[AnyArray, " B"]
    budget_signal: Float32[AnyArray, " B"]


class PruneTrace(flax.struct.PyTreeNode):
    """Everything that pruning decided, for counting, logging and drawing.

    Attributes:
        encode: by encoder, its `EncodeTrace`.
        fused_encoder, fused_patch_index: the tokens that left fusion.
        prune_steps: one `PruneStepTrace` a step in the decoder; empty in training.
        loss: what methods add to the training loss.
    """

    encode: dict[str, EncodeTrace]
    fused_encoder: Int32[AnyArray, "I N"]
    fused_patch_index: Int32[AnyArray, "I N"]
    prune_steps: tuple[PruneStepTrace, ...] = ()
    loss: Float32[AnyArray, " I"] | None = None


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
