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
        turn: int32[B, T]; 0 for what every turn sees, which comes first, then the number of the
            turn, which sees that and itself, at the positions that it would have alone. None
            where every token sees all before it.
    """

    images: Array
    image_valid: Array
    tokens: Array
    text_valid: Array
    labels: Array
    example_id: Array
    turn: Array | None = None


@flax.struct.dataclass
class VisualTokens:
    """Tokens of one image, from one encoder or from all of them joined.

    Shapes:
        x: float[..., N, D].
        encoder: int32[..., N]; which of the encoders that ran a token
            comes from, in the model's order.
        raster: int32[..., N]; its row-major place in that encoder's own output grid.
        position: int32[..., N]; its place within the span that the image takes in the sequence.
        span: how many positions an image takes (static).
    """

    x: Array
    encoder: Array
    raster: Array
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
        slot: int32[B, S]; place in the row of text tokens, which for a visual token is that of
            its `IMAGE_TOKEN`; it never decreases along the valid entries.
        visual: int32[B, S]; index into the row's M·N visual tokens, −1 for a text token.
        turn: int32[B, S] or None, as in `Batch`.
    """

    x: Array
    position: Array
    valid: Array
    slot: Array
    visual: Array
    turn: Array | None = None

    @property
    def is_visual(self) -> Array:
        """bool[B, S]."""
        return self.valid & (self.visual >= 0)

    @property
    def is_text(self) -> Array:
        """bool[B, S]."""
        return self.valid & (self.visual < 0)


@flax.struct.dataclass
class SegmentCache:
    """Keys and values of the layers between two cuts; prompt first, then room for new tokens.

    Shapes:
        k, v: float[L, B, S, num_kv_heads, head_dim], keys already rotated.
        valid: bool[B, S].
        next_position: int32[B]; rotary position of the first new token in this segment.
        num_room: entries at the end of S that are for new tokens (static).
    """

    k: Array
    v: Array
    valid: Array
    next_position: Array
    num_room: int = flax.struct.field(pytree_node=False)

    def append(self, k: Array, v: Array, *, num_new: Array) -> SegmentCache:
        """Writes keys and values float[L, B, T, num_kv_heads, head_dim] of T more tokens, after
        the `num_new` that came since the prefill. All rows write at one place, so nothing is
        scattered; `num_room` is what `prefill` was asked for."""
        start = self.valid.shape[1] - self.num_room + num_new
        added = jnp.ones((self.valid.shape[0], k.shape[2]), bool)
        return self.replace(
            k=jax.lax.dynamic_update_slice_in_dim(self.k, k.astype(self.k.dtype), start, axis=2),
            v=jax.lax.dynamic_update_slice_in_dim(self.v, v.astype(self.v.dtype), start, axis=2),
            valid=jax.lax.dynamic_update_slice_in_dim(self.valid, added, start, axis=1),
        )


@flax.struct.dataclass
class DecodeCache:
    """One `SegmentCache` a segment, and how many tokens were appended since the prefill."""

    segments: tuple[SegmentCache, ...]
    num_new: Array  # int32[]


@flax.struct.dataclass
class EncodeTrace:
    """Which of an encoder's tokens were alive after each boundary: int32[I, K] raster indices."""

    kept: tuple[Array, ...]


@flax.struct.dataclass
class CutTrace:
    """What one cut inside the LLM did.

    Shapes:
        visual: int32[B, K_max]; kept visual tokens (indices into M·N), −1 where none.
        num_kept: int32[B]; visual tokens kept for the example.
        bucket: int32[]; static size that the batch was packed into (visual tokens a row).
        visual_attention_value: float32[B, heads]; VAV of every head (METEOR's name), 0 where the
            criterion does not use attention.
    """

    visual: Array
    num_kept: Array
    bucket: Array
    visual_attention_value: Array


@flax.struct.dataclass
class PruneTrace:
    """Everything that pruning decided, for counting, logging and drawing.

    Shapes:
        encode: by encoder, its `EncodeTrace`.
        fused_encoder, fused_raster: int32[I, N]; the tokens that left fusion.
        cuts: one `CutTrace` a cut in the LLM; empty in training.
    """

    encode: dict[str, EncodeTrace]
    fused_encoder: Array
    fused_raster: Array
    cuts: tuple[CutTrace, ...] = ()


def take_tokens(tokens: VisualTokens, idx: Array) -> VisualTokens:
    """The tokens at `idx` (int32[..., K]) along the token axis."""

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, idx, axis=-1)

    return tokens.replace(
        x=jnp.take_along_axis(tokens.x, idx[..., None], axis=-2),
        encoder=take(tokens.encoder),
        raster=take(tokens.raster),
        position=take(tokens.position),
    )
