"""EVA-02 (Fang et al. 2023, arXiv 2303.11331) with the detector's window attention, as EAGLE runs
it: every third block attends over the whole grid, the others in windows; no CLS token, no norm
after the blocks.

I images, N tokens, W windows, S tokens of a window, E width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.models.encoders.sizes import TransformerSizes, check_multiple
from meteor_jax.models.layers.remat import save_as
from meteor_jax.models.layers.resize import patchify, resize
from meteor_jax.models.layers.stack import Stack, StackOutput, constrain, dense, gated_silu
from meteor_jax.models.layers.windows import (
    attend_windows,
    contiguous_runs,
    from_windows,
    received_in_windows,
    to_windows,
)
from meteor_jax.pruning.encode import (
    EncoderCut,
    EncoderOutput,
    EncoderState,
    encode_segments,
)
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
        # A head's channels: rows and columns, each in pairs that turn together.
        check_multiple("width", self.width, of="4 · num_heads", factor=4 * self.num_heads)

    @property
    def grid(self) -> int:
        """Side of the output grid."""
        return self.image_size // self.patch_size

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


@flax.struct.dataclass
class Rotary:
    """The windows of a block, and how far to turn the queries and keys of their tokens.

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

    def turn(self, x: Array) -> Array:
        """Turns the channel pairs (0, 1), (2, 3), … of float[I, W, S, H, d], in float32."""
        first, second = x[..., ::2], x[..., 1::2]
        across = jnp.stack([-second, first], axis=-1).reshape(x.shape)
        cos, sin = self.cos_sin[..., :1, :], self.cos_sin[..., 1:, :]
        return (x * cos + across * sin).astype(x.dtype)


class Attention(nn.Module):
    """Self-attention inside windows with rotary positions; the keys have no bias."""

    config: Eva02Config
    dtype: Any = jnp.float32

    def setup(self) -> None:
        width = self.config.width
        self.query = dense(width, dtype=self.dtype)
        self.key = dense(width, use_bias=False, dtype=self.dtype)
        self.value = dense(width, dtype=self.dtype)
        self.out = dense(width, dtype=self.dtype)

    def __call__(self, x: Array, rotary: Rotary) -> Array:
        q, k = self.query_key(x, rotary)
        mixed = attend_windows(q, k, self._heads(self.value(x), rotary))
        return self.out(from_windows(mixed, sizes=rotary.window_sizes).reshape(x.shape))

    def query_key(self, x: Array, rotary: Rotary) -> tuple[Array, Array]:
        """Queries and keys before the scale 1/√d, float[I, W, S, H, d] each."""
        q, k = self._heads(self.query(x), rotary), self._heads(self.key(x), rotary)
        return rotary.turn(q), rotary.turn(k)

    def _heads(self, x: Array, rotary: Rotary) -> Array:
        x = x.reshape(*x.shape[:-1], self.config.num_heads, -1)
        return to_windows(x, sizes=rotary.window_sizes, length=rotary.length)


class GatedMLP(nn.Module):
    """out(norm(silu(gate(x)) · up(x))), biases everywhere."""

    config: Eva02Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate = save_as("mlp", dense(self.config.mlp_dim, dtype=self.dtype, name="gate")(x))
        up = save_as("mlp", dense(self.config.mlp_dim, dtype=self.dtype, name="up")(x))
        x = layer_norm(self.dtype, name="norm")(gated_silu(gate, up))
        return dense(self.config.width, dtype=self.dtype, name="out")(x)


class Block(nn.Module):
    """A pre-norm transformer block."""

    config: Eva02Config
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.norm1 = layer_norm(self.dtype)
        self.attention = Attention(self.config, self.dtype)
        self.norm2 = layer_norm(self.dtype)
        self.mlp = GatedMLP(self.config, self.dtype)

    def __call__(self, x: Array, rotary: Rotary) -> tuple[Array, None]:
        x = save_as("residual", x + self.attention(self.norm1(x), rotary))
        x = x + self.mlp(self.norm2(x))
        return constrain(x, "btd"), None

    def query_key(self, x: Array, rotary: Rotary) -> tuple[Array, Array]:
        """Queries and keys of the block's attention, from the block's input."""
        return self.attention.query_key(self.norm1(x), rotary)


class Eva02(nn.Module):
    """Images to tokens."""

    config: Eva02Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: Array,
        *,
        cuts: tuple[EncoderCut, ...] | None = None,
        image_seed: Array | None = None,
    ) -> EncoderOutput:
        """Encodes images of any size, normalised with CLIP's mean and standard deviation.

        How cuts meet windows is our reading, METEOR speaks of thirds of the blocks and not of
        windows: a cut keeps equally many tokens in every window, and kept tokens turn by their
        original places. No segment ends inside a period, so that each segment is one scan over
        periods: the thirds of 24 blocks, 8, 16 and 24, become 9, 15 and 24. Every segment then ends
        with a global block, so the attention that a token receives is that from the whole grid.
        An encoder of fewer periods than segments ends them anywhere, and attention received counts
        inside the windows where the segment's last block has them.

        Shapes:
            images: float[I, H, W, 3], H = W.
            image_seed: uint32[I], a hash of each image, for cuts by "random".
            returns: `num_tokens` tokens, or as many as the last of the three `cuts` keeps.

        Raises:
            ValueError: if there are not three cuts, one keeps more tokens than there are or not a
                multiple of `num_windows`, or one asks for a CLS token.
        """
        config = self.config
        for cut in cuts or ():
            if cut.criterion == "cls":
                raise ValueError("criterion 'cls': EVA-02 has no CLS token; use 'attention'.")
            check_multiple("keep", cut.keep, of="num_windows", factor=config.num_windows)

        x = self._embed(images)
        tables = jax.lax.stop_gradient(self.param("tables", lambda _: rotary_tables(config)))
        tables = tables_by_place(config, tables)
        stack = Stack(Block, config, config.depth, self.dtype, config.remat, name="blocks")

        def run(tokens: EncoderState, start: int, stop: int) -> StackOutput:
            rotary = tuple((self._rotary(tokens, tables, kind),) for kind in (False, True))
            runs = tuple(contiguous_runs(start, stop, global_blocks=config.global_blocks))
            return stack.alternate(tokens.x, runs=runs, aux=rotary)

        def attention(block: int, tokens: EncoderState, criterion: str) -> Array:
            rotary = self._rotary(tokens, tables, block in config.global_blocks)
            q, k = stack.layer(block, tokens.x, rotary, method="query_key")
            return received_in_windows(q, k).reshape(tokens.raster.shape)

        return encode_segments(
            x,
            cuts=cuts,
            bounds=config.segment_ends,
            run=run,
            attention=attention,
            window=config.window,
            image_seed=image_seed,
        )

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

    def _rotary(self, tokens: EncoderState, tables: tuple[Array, Array], is_global: bool) -> Rotary:
        num_windows = 1 if is_global else self.config.num_windows
        place = tokens.raster.reshape(tokens.raster.shape[0], num_windows, -1)
        return Rotary(tables[is_global].at[place].get(mode="promise_in_bounds"))


def tables_by_place(config: Eva02Config, tables: dict[str, Array]) -> tuple[Array, Array]:
    """Cosines and sines float32[N, 2, d] of every place of the grid, in a windowed block and in a
    global one, of the tables that the parameters hold."""
    row, column = np.divmod(np.arange(config.num_tokens), config.grid)
    in_window = row % config.window * config.window + column % config.window
    windowed, whole = (
        jnp.stack([tables[f"{name}_cos"], tables[f"{name}_sin"]], axis=1)
        for name in ("window", "global")
    )
    return windowed[in_window], whole


def rotary_tables(config: Eva02Config) -> dict[str, Array]:
    """Cosines and sines for the places of a window, and for those of the grid, whose places are
    drawn together so that the grid is as wide as a window.

    Half of a head's channels turn by the row, half by the column; a pair of channels turns by one
    angle. EAGLE's checkpoints carry these tables, rounded to the dtype that they were trained in.

    Shapes:
        returns: float32[window², d] for "window_cos" and "window_sin", float32[grid², d] for
            "global_cos" and "global_sin".
    """
    axis_dim = config.width // config.num_heads // 2
    frequency = np.repeat(ROTARY_BASE ** (-np.arange(0, axis_dim, 2) / axis_dim), 2)
    tables = {}
    for name, side in (("window", config.window), ("global", config.grid)):
        turns = np.arange(side)[:, None] / side * config.window * frequency
        rows = np.broadcast_to(turns[:, None], (side, side, axis_dim))
        angle = np.concatenate([rows, rows.swapaxes(0, 1)], axis=-1).reshape(side**2, -1)
        tables[f"{name}_cos"] = jnp.asarray(np.cos(angle), jnp.float32)
        tables[f"{name}_sin"] = jnp.asarray(np.sin(angle), jnp.float32)
    return tables


def layer_norm(dtype: Any, *, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=EPSILON, dtype=dtype, use_fast_variance=False, name=name)
