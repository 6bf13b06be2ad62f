"""SAM's image encoder (Kirillov et al. 2023, arXiv 2304.02643), as EAGLE runs it: the neck is one
1×1 convolution and a norm, and each 2×2 of its tokens becomes one token that comes out.

Blocks attend in windows, a few over the whole grid, with relative positions by row and column.

A cut decides about whole 2×2 groups: a group is one token of the loop between the blocks, its
features joined, and four tokens in a block. I images, N groups, W windows, S slots of a window,
E width of a block, H heads, d head width, R rows (or columns) of a window.
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
from meteor_jax.models.layers.stack import Stack, StackOutput, constrain, dense
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
from meteor_jax.pruning.ops.windows import window_slots
from meteor_jax.types import Array

EPSILON = 1e-6
GROUP = 2  # side of the squares of tokens that come out as one
SCALE = 1.0  # queries are scaled before their relative positions are joined to them
SHARDING_RULES = (
    (r"neck/kernel$", ("tensor", "fsdp")),
    (r"relative_(window|global)/", ()),  # small
)


@dataclass(frozen=True)
class SamConfig(TransformerSizes):
    """Sizes; the defaults are SAM ViT-L at 1,024 pixels, with EAGLE's neck.

    Its windows hold unequal numbers of tokens where they do not divide the grid. Their quotas are
    in proportion, so any number of tokens can be kept (`num_windows` is 1).

    Attributes:
        image_size: pixels that the encoder sees; the image is resized to it.
        block_width: width of a block; `width` is that of the tokens that come out.
        window: side of an attention window, in tokens, even.
        global_blocks: the blocks that attend over the whole grid.
        neck_width: channels of the neck; a token that comes out has four times as many.
        remat: see `Stack`.
    """

    image_size: int = 1024
    patch_size: int = 16
    block_width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    window: int = 14
    global_blocks: tuple[int, ...] = (5, 11, 17, 23)
    neck_width: int = 256
    remat: str = "none"

    def __post_init__(self) -> None:
        check_multiple(
            "image_size", self.image_size, of="2 · patch_size", factor=GROUP * self.patch_size
        )
        check_multiple("window", self.window, of="a group's side,", factor=GROUP)
        check_multiple("block_width", self.block_width, of="num_heads", factor=self.num_heads)
        if any(not 0 <= block < self.depth for block in self.global_blocks):
            raise ValueError(
                f"global_blocks: expected numbers from 0 to {self.depth - 1}, the blocks of "
                f"depth={self.depth}, got {self.global_blocks}."
            )

    @property
    def grid(self) -> int:
        """Side of the output grid."""
        return self.image_size // (GROUP * self.patch_size)

    @property
    def width(self) -> int:
        return GROUP**2 * self.neck_width


@flax.struct.dataclass
class Place:
    """The windows of a block, and what is in their slots.

    Shapes:
        row, column: int[W, S], int[1, W, S] or int[I, W, S]; the place of a slot in its window.
        real: bool[W, S]; False for a slot without a token.
        seen: bool[W, S]; what queries may look at, None for all. In the edge windows of the whole
            grid they look at slots without a token too, which are zeros after the norm.
        sizes: tokens in each window (static).
        side: rows, and columns, of a window (static).
    """

    row: Array
    column: Array
    real: Array
    seen: Array | None
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    side: int = flax.struct.field(pytree_node=False)


class Attention(nn.Module):
    """Self-attention inside windows with relative positions, biases everywhere."""

    config: SamConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.qkv = dense(3 * self.config.block_width, dtype=self.dtype)
        self.out = dense(self.config.block_width, dtype=self.dtype)

    def __call__(self, x: Array, place: Place, relative: dict[str, Array] | None) -> Array:
        q, k, v = self._query_key_value(x, place, relative)
        mixed = attend_windows(q, k, v, real=place.seen, scale=SCALE)
        return self.out(from_windows(mixed, sizes=place.sizes).reshape(x.shape))

    def query_key(
        self, x: Array, place: Place, relative: dict[str, Array] | None
    ) -> tuple[Array, Array]:
        """Scaled queries and keys with their relative positions, float[I, W, S, H, d + 2R]."""
        return self._query_key_value(x, place, relative)[:2]

    def _query_key_value(
        self, x: Array, place: Place, relative: dict[str, Array] | None
    ) -> tuple[Array, Array, Array]:
        x = to_windows(x, sizes=place.sizes, length=place.row.shape[-1])
        qkv = self.qkv(x)
        qkv = qkv.reshape(*qkv.shape[:-1], 3, self.config.num_heads, -1)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        if relative is None:
            return q * q.shape[-1] ** -0.5, k, v
        return *join_relative_positions(q, k, place=place, relative=relative), v


def join_relative_positions(
    q: Array, k: Array, *, place: Place, relative: dict[str, Array]
) -> tuple[Array, Array]:
    """Queries and keys whose product is q·k / √d + q·h[row_q − row_k] + q·w[column_q − column_k].

    The terms of the positions are more channels of the product: a query's are its products with
    the entries for every row and column of its window, a key's are ones at its own. So no map of
    them is built, and attention need not know.

    Shapes:
        q, k: float[I, W, S, H, d].
        relative: float[2R − 1, d] for "height" and "width".
        returns: float[I, W, S, H, d + 2R] twice.
    """
    side = place.side
    distance = np.arange(side)[:, None] - np.arange(side) + side - 1
    queries, keys = [q * q.shape[-1] ** -0.5], [k]
    for name, own in (("height", place.row), ("width", place.column)):
        entries = relative[name].astype(q.dtype)[distance][own]  # [..., W, S, R, d]
        queries.append(jnp.einsum("...hd,...rd->...hr", q, entries))
        at = jax.nn.one_hot(own, side, dtype=k.dtype)[..., None, :]
        keys.append(jnp.broadcast_to(at, (*k.shape[:-1], side)))
    return jnp.concatenate(queries, axis=-1), jnp.concatenate(keys, axis=-1)


class MLP(nn.Module):
    """Two layers with exact GELU between them."""

    config: SamConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = save_as("mlp", dense(self.config.mlp_dim, dtype=self.dtype, name="fc1")(x))
        x = nn.gelu(x, approximate=False)
        return dense(self.config.block_width, dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
    """A pre-norm transformer block. `relative` may be None where only parameters are made."""

    config: SamConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.norm1 = layer_norm(self.dtype)
        self.attention = Attention(self.config, self.dtype)
        self.norm2 = layer_norm(self.dtype)
        self.mlp = MLP(self.config, self.dtype)

    def __call__(
        self, x: Array, place: Place, relative: dict[str, Array] | None = None
    ) -> tuple[Array, None]:
        x = save_as("residual", x + self.attention(self.norm1(x), place, relative))
        x = x + self.mlp(self.norm2(x))
        return constrain(x, "btd"), None

    def query_key(self, x: Array, place: Place, relative: dict[str, Array]) -> tuple[Array, Array]:
        """Queries and keys of the block's attention, from the block's input."""
        return self.attention.query_key(self.norm1(x), place, relative)


class Sam(nn.Module):
    """Images to tokens."""

    config: SamConfig
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

        How cuts meet windows and groups is our reading, METEOR speaks of neither: a cut keeps
        whole 2×2 groups, whose score is their joined features' likeness to the mean group, or the
        mean of the attention that the four receive (inside the windows where the segment's last
        block has them); a window's quota is in proportion to the real tokens it holds; and the
        zeros that fill the edge windows of the whole grid are gone after the first real cut.
        Segments are thirds of the blocks, wherever the global ones lie: in whole periods, of which
        there are four, they would end at 6, 18 and 24.

        Shapes:
            images: float[I, H, W, 3], H = W.
            image_seed: uint32[I], a hash of each image, for cuts by "random".
            returns: `num_tokens` tokens, or as many as the last of the three `cuts` keeps; the
                features at a boundary are those of the four tokens of a group, joined.

        Raises:
            ValueError: if there are not three cuts, one keeps more tokens than there are, or one
                asks for a CLS token.
        """
        config = self.config
        if any(cut.criterion == "cls" for cut in cuts or ()):
            raise ValueError("criterion 'cls': SAM has no CLS token; use 'attention'.")

        x = self._embed(images)
        relative = {kind: self._relative_positions(kind) for kind in (False, True)}
        stack = Stack(Block, config, config.depth, self.dtype, config.remat, name="blocks")

        def tables(start: int, stop: int, is_global: bool) -> dict[str, Array]:
            """Those of the blocks of a kind in `[start, stop)`."""
            before, after = (
                sum((b in config.global_blocks) == is_global for b in range(end))
                for end in (start, stop)
            )
            return jax.tree.map(lambda table: table[before:after], relative[is_global])

        def run(tokens: EncoderState, start: int, stop: int) -> StackOutput:
            runs = tuple(contiguous_runs(start, stop, global_blocks=config.global_blocks))
            out = stack.alternate(
                ungroup(tokens.x),
                runs=runs,
                aux=tuple((self._place(tokens, kind),) for kind in (False, True)),
                per_layer=tuple((tables(start, stop, kind),) for kind in (False, True)),
            )
            return out.replace(x=regroup(out.x), last_input=regroup(out.last_input))

        def attention(block: int, tokens: EncoderState, criterion: str) -> Array:
            is_global = block in config.global_blocks
            place = self._place(tokens, is_global)
            table = jax.tree.map(lambda t: t[0], tables(block, block + 1, is_global))
            q, k = stack.layer(block, ungroup(tokens.x), place, table, method="query_key")
            received = received_in_windows(q, k, rows=place.real, real=place.seen, scale=SCALE)
            received = from_windows(received, sizes=place.sizes)
            return received.reshape(*tokens.raster.shape, GROUP**2).mean(-1)

        out = encode_segments(
            x,
            cuts=cuts,
            bounds=config.segment_ends,
            run=run,
            attention=attention,
            window=config.window // GROUP,
            image_seed=image_seed,
        )
        return out.replace(x=self._neck(out.x))

    def _embed(self, images: Array) -> Array:
        """Patches with their positions, joined in groups, float[I, N, 4E]."""
        config = self.config
        images = resize(images, size=config.image_size).astype(self.dtype)
        patches = patchify(images, patch=config.patch_size)
        x = dense(config.block_width, dtype=self.dtype, name="patch_embedding")(patches)
        init = nn.initializers.normal(0.02)
        position = self.param("position_embedding", init, x.shape[1:])
        x = patchify(x + position.astype(self.dtype), patch=GROUP)
        return constrain(x.reshape(x.shape[0], config.num_tokens, -1), "btd")

    def _relative_positions(self, is_global: bool) -> dict[str, Array]:
        """The tables of all blocks of a kind, by axis."""
        config = self.config
        num_global = len(config.global_blocks)
        name, num_blocks, side = "relative_window", config.depth - num_global, config.window
        if is_global:
            name, num_blocks, side = "relative_global", num_global, GROUP * config.grid
        shape = (num_blocks, 2 * side - 1, config.block_width // config.num_heads)
        zeros = nn.initializers.zeros
        return self.param(
            name, lambda key: {axis: zeros(key, shape) for axis in ("height", "width")}
        )

    def _place(self, tokens: EncoderState, is_global: bool) -> Place:
        grid, window = self.config.grid, self.config.window // GROUP
        sizes, raster = tokens.window_sizes, tokens.raster
        whole = raster.shape[1] == self.config.num_tokens
        if is_global:
            sizes, window = (raster.shape[1],), grid
            raster = raster[:1] if whole else raster  # all images have the same tokens
        if whole and not is_global:
            row, column = padded_windows(grid, window)
        else:
            row, column = (
                to_windows(place, sizes=sizes, length=max(sizes))
                for place in (raster // grid, raster % grid)
            )
        _, real = window_slots(sizes, length=row.shape[-1])
        real = np.repeat(real, GROUP**2, axis=-1)
        dy, dx = np.divmod(np.arange(GROUP**2), GROUP)
        return Place(
            row=(GROUP * (row % window)[..., None] + dy).reshape(*row.shape[:-1], -1),
            column=(GROUP * (column % window)[..., None] + dx).reshape(*row.shape[:-1], -1),
            real=real,
            seen=None if whole or real.all() else real,
            sizes=tuple(GROUP**2 * size for size in sizes),
            side=GROUP * window,
        )

    def _neck(self, x: Array) -> Array:
        """Joined groups float[I, N, 4E] to what comes out, the channel slowest, then the row and
        the column in the group (PyTorch's pixel_unshuffle)."""
        neck = dense(self.config.neck_width, use_bias=False, dtype=self.dtype, name="neck")
        x = layer_norm(self.dtype, name="neck_norm")(neck(ungroup(x)))
        x = x.reshape(x.shape[0], -1, GROUP**2, self.config.neck_width)
        return x.swapaxes(2, 3).reshape(x.shape[0], -1, self.config.width)


def ungroup(x: Array) -> Array:
    """float[I, N, 4E] → float[I, 4N, E]: the four tokens of a group one after the other."""
    return x.reshape(x.shape[0], GROUP**2 * x.shape[1], -1)


def regroup(x: Array) -> Array:
    """float[I, 4N, E] → float[I, N, 4E]."""
    return x.reshape(x.shape[0], x.shape[1] // GROUP**2, -1)


def padded_windows(grid: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """int[W, window²], rows and columns of the slots of windows over a grid that is padded at its
    far edges: real places first, in the order of `window_order`, then the padding."""
    side = -(-grid // window) * window
    row, column = np.divmod(np.arange(side**2), side)
    padding = (row >= grid) | (column >= grid)
    order = np.lexsort((column, row, padding, column // window, row // window))
    return row[order].reshape(-1, window**2), column[order].reshape(-1, window**2)


def layer_norm(dtype: Any, *, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=EPSILON, dtype=dtype, use_fast_variance=False, name=name)
