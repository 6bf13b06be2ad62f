"""EVA-02 (Fang et al. 2023, arXiv 2303.11331) with the detector's window attention, as EAGLE runs
it: every third block attends over the whole grid, the others in windows; no CLS token, no norm
after the blocks.

I images, N tokens, W windows, S tokens of a window, E width, H heads, d head width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.models.encoders.sizes import TransformerSizes, check_multiple
from meteor_jax.models.encoders.tokens import (
    EncoderOutput,
    EncoderTokens,
    Segment,
    check_cls,
    drops,
    finish,
    prune_tokens,
    split_depth,
)
from meteor_jax.models.layers.resize import patchify, resize
from meteor_jax.models.layers.stack import Stack, constrain, dense, gated_silu
from meteor_jax.models.layers.vit_block import GatedMlp, SelfAttention, VitBlock, layer_norm
from meteor_jax.models.layers.windows import (
    attend_windows,
    contiguous_runs,
    from_windows,
    received_in_windows,
    to_windows,
)
from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.method import ReductionContext
from meteor_jax.types import Array

EPSILON = 1e-6
ROTARY_BASE = 10000.0
SHARDING_RULES = ((r"/tables/", ("fsdp", None)),)


@dataclass(frozen=True)
class Eva02Config(TransformerSizes):
    """Sizes; the defaults are EVA-02-L/16 at 1,024 pixels.

    Attributes:
        image_size: pixels that the encoder sees; the image is resized to it.
        window: side of an attention window, in tokens; it divides the grid.
        global_every: one block in so many, the last of them, attends over the whole grid.
        position_side: side of the grid that the position embedding was trained on.
        remat: see `Stack`.
    """

    type: Literal["eva02"] = "eva02"
    image_size: int = 1024
    patch_size: int = 16
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 2730
    window: int = 16
    global_every: int = 3
    position_side: int = 14
    remat: str = "none"

    def __post_init__(self) -> None:
        check_multiple("image_size", self.image_size, of="patch_size", factor=self.patch_size)
        check_multiple("grid", self.grid, of="window", factor=self.window)
        # A head's channels: rows and columns, each in pairs that rotate together.
        check_multiple("width", self.width, of="4 · num_heads", factor=4 * self.num_heads)

    @property
    def grid(self) -> int:
        """Side of the output grid."""
        return self.image_size // self.patch_size

    prunes_in_blocks = False

    @property
    def num_windows(self) -> int:
        """All windows keep equally many tokens, so this divides any number of kept tokens."""
        return (self.grid // self.window) ** 2

    @property
    def period(self) -> int:
        return self.global_every

    @property
    def global_blocks(self) -> range:
        return range(self.global_every - 1, self.depth, self.global_every)


class Rotary(flax.struct.PyTreeNode):
    """The windows of a block, and the angles by which the queries and keys of their tokens rotate.

    Shapes:
        cos_sin: float32[I, W, S, 2, d].
    """

    cos_sin: Array

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.cos_sin.shape[2]

    @property
    def window_sizes(self) -> tuple[int, ...]:
        return (self.length,) * self.cos_sin.shape[1]

    def apply_rotary(self, x: Array) -> Array:
        """Rotates the channel pairs (0, 1), (2, 3), … of float[I, W, S, H, d], in float32."""
        first, second = x[..., ::2], x[..., 1::2]
        across = jnp.stack([-second, first], axis=-1).reshape(x.shape)
        cos, sin = self.cos_sin[..., :1, :], self.cos_sin[..., 1:, :]
        return (x * cos + across * sin).astype(x.dtype)


class WindowAttention(SelfAttention):
    """Self-attention inside windows with rotary positions."""

    def __call__(self, x: Array, *aux: Rotary) -> Array:
        (rotary,) = aux
        q, k = self.query_key(x, rotary)
        mixed = attend_windows(q, k, self._windows(self.value(x), rotary))
        return self.out(from_windows(mixed, sizes=rotary.window_sizes).reshape(x.shape))

    def query_key(self, x: Array, *aux: Rotary) -> tuple[Array, Array]:
        """Queries and keys before the scale 1/√d, float[I, W, S, H, d] each."""
        (rotary,) = aux
        q, k = self._windows(self.query(x), rotary), self._windows(self.key(x), rotary)
        return rotary.apply_rotary(q), rotary.apply_rotary(k)

    def _windows(self, x: Array, rotary: Rotary) -> Array:
        return to_windows(self.heads(x), sizes=rotary.window_sizes, length=rotary.length)


class Block(VitBlock):
    """Gated SiLU with a norm inside; the keys have no bias."""

    def make_norm(self) -> nn.Module:
        return layer_norm(self.dtype, epsilon=EPSILON)

    def make_attention(self) -> nn.Module:
        width, num_heads = self.config.width, self.config.num_heads
        return WindowAttention(width, num_heads, key_bias=False, dtype=self.dtype)

    def make_mlp(self) -> nn.Module:
        norm = functools.partial(layer_norm, epsilon=EPSILON)
        width, hidden = self.config.width, self.config.mlp_dim
        return GatedMlp(width, hidden, gated_silu, norm=norm, dtype=self.dtype)


class Eva02(nn.Module):
    """Images to tokens."""

    config: Eva02Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Array,
        *,
        steps: tuple[EncoderStep, ...] = (),
        context: ReductionContext | None = None,
        all_segments: bool = False,
    ) -> EncoderOutput:
        """Encodes images of any size, normalised with CLIP's mean and standard deviation.

        How steps meet windows is our reading, METEOR speaks of thirds of the blocks and not of
        windows: a step keeps equally many tokens in every window, and kept tokens rotate by their
        original places. No segment ends inside a period, so that each segment is one scan over
        periods: the thirds of 24 blocks, 8, 16 and 24, become 9, 15 and 24. Every segment then ends
        with a global block, so the attention that a token receives is that from the whole grid.
        An encoder of fewer periods than segments ends them anywhere, and attention received counts
        inside the windows where the segment's last block has them.

        Shapes:
            images: float[I, H, W, 3], H = W.
            context: what the methods of `steps` may need that is not the encoder's own.
            returns: `num_tokens` tokens, or what the last of the `steps` leaves; with
                `all_segments` also the features after each segment.

        Raises:
            ValueError: if a step keeps more tokens than there are or not a multiple of
                `num_windows`, or asks for a CLS token.
        """
        config, context = self.config, context or ReductionContext()
        check_cls(steps, has_cls=False, advice="EVA-02 has none")
        for step in steps:
            check_multiple("keep", step.keep, of="num_windows", factor=config.num_windows)

        tokens = EncoderTokens.start(self._embed(images), window=config.window)
        freqs = jax.lax.stop_gradient(self.param("tables", lambda _: rope_freqs(config)))
        freqs = freqs_by_place(config, freqs)
        blocks = Stack(Block, config, config.depth, self.dtype, config.remat, name="blocks")
        passed = []
        for segment in split_depth(config, steps, all_segments=all_segments):
            rotary = tuple(self._rotary(tokens, freqs, is_global) for is_global in (False, True))
            runs = contiguous_runs(segment.start, segment.stop, global_blocks=config.global_blocks)
            out = blocks.alternate(
                tokens.x, runs=tuple(runs), aux=tuple((kind,) for kind in rotary)
            )
            tokens = tokens.replace(x=out.x)
            for step in segment.after:
                seen = context
                if drops(step, tokens) and "attention_received" in step.method.needs:
                    kind = rotary[segment.last_block in config.global_blocks]
                    received = _attention_received(blocks, segment, out.last_input, kind)
                    received = received.reshape(tokens.patch_index.shape)
                    seen = context.replace(attention_received=received)
                tokens = prune_tokens(tokens, step, context=seen)
            passed.append((segment, tokens))
        return finish(passed, num_tokens=config.num_tokens)

    def _embed(self, images: Array) -> Array:
        """Patches with their positions, float[I, N, E]."""
        config = self.config
        images = resize(images, size=config.image_size).astype(self.dtype)
        patches = patchify(images, patch=config.patch_size)
        x = dense(config.width, dtype=self.dtype, name="patch_embedding")(patches)
        side = config.position_side
        position = self.param(
            "position_embedding", nn.initializers.normal(0.02), (1 + side**2, config.width)
        )
        position = position[1:].reshape(side, side, -1)  # the first is the CLS token's
        x = x + resize(position, size=config.grid, method="bicubic").astype(self.dtype)
        return constrain(x.reshape(x.shape[0], -1, config.width), "btd")

    def _rotary(self, tokens: EncoderTokens, freqs: tuple[Array, Array], is_global: bool) -> Rotary:
        num_windows = 1 if is_global else self.config.num_windows
        place = tokens.patch_index.reshape(tokens.patch_index.shape[0], num_windows, -1)
        return Rotary(freqs[is_global].at[place].get(mode="promise_in_bounds"))


@jax.named_scope("scores")
def _attention_received(blocks: Stack, segment: Segment, x: Array, rotary: Rotary) -> Array:
    """float32[I, W, S]: what each token gets in the last block of a segment, whose input is x."""
    q, k = blocks.layer(segment.last_block, x, rotary, method="query_key")
    return received_in_windows(q, k)


def freqs_by_place(config: Eva02Config, freqs: dict[str, Array]) -> tuple[Array, Array]:
    """Cosines and sines float32[N, 2, d] of every place of the grid, in a windowed block and in a
    global one, of those that the parameters hold."""
    row, column = np.divmod(np.arange(config.num_tokens), config.grid)
    in_window = row % config.window * config.window + column % config.window
    windowed, whole = (
        jnp.stack([freqs[f"{name}_cos"], freqs[f"{name}_sin"]], axis=1)
        for name in ("window", "global")
    )
    return windowed[in_window], whole


def rope_freqs(config: Eva02Config) -> dict[str, Array]:
    """Cosines and sines for the places of a window, and for those of the grid, whose places are
    drawn together so that the grid is as wide as a window.

    Half of a head's channels rotate by the row, half by the column; a pair of channels rotates by
    one angle. EAGLE's checkpoints carry these tables, rounded to the dtype of their training.

    Shapes:
        returns: float32[window², d] for "window_cos" and "window_sin", float32[grid², d] for
            "global_cos" and "global_sin".
    """
    axis_dim = config.width // config.num_heads // 2
    frequency = np.repeat(ROTARY_BASE ** (-np.arange(0, axis_dim, 2) / axis_dim), 2)
    freqs = {}
    for name, side in (("window", config.window), ("global", config.grid)):
        angles = np.arange(side)[:, None] / side * config.window * frequency
        rows = np.broadcast_to(angles[:, None], (side, side, axis_dim))
        angle = np.concatenate([rows, rows.swapaxes(0, 1)], axis=-1).reshape(side**2, -1)
        freqs[f"{name}_cos"] = jnp.asarray(np.cos(angle), jnp.float32)
        freqs[f"{name}_sin"] = jnp.asarray(np.sin(angle), jnp.float32)
    return freqs
