"""SAM's image encoder (Kirillov et al. 2023, arXiv 2304.02643), as EAGLE runs it: the neck is one
1×1 convolution and a norm, and each 2×2 of its tokens becomes one token that comes out.

Blocks attend in windows, a few over the whole grid, with relative positions by row and column.

A step decides about whole 2×2 squares: a square is one token between the segments, its features
joined, and four tokens in a block. I images, N squares, W windows, S slots of a window,
E width of a block, H heads, d head width, R rows (or columns) of a window.
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
from meteor_jax.models.layers.stack import Stack, constrain, dense
from meteor_jax.models.layers.vit_block import Mlp, VitBlock, layer_norm
from meteor_jax.models.layers.windows import (
    attend_windows,
    contiguous_runs,
    from_windows,
    received_in_windows,
    to_windows,
)
from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.method import ReductionContext
from meteor_jax.pruning.ops.windows import window_slots
from meteor_jax.types import AnyArray, Array

EPSILON = 1e-6
MERGE = 2  # side of the squares of tokens that come out as one
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

    type: Literal["sam"] = "sam"
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
            "image_size", self.image_size, of="2 · patch_size", factor=MERGE * self.patch_size
        )
        check_multiple("window", self.window, of="a square's side,", factor=MERGE)
        check_multiple("block_width", self.block_width, of="num_heads", factor=self.num_heads)
        if any(not 0 <= block < self.depth for block in self.global_blocks):
            raise ValueError(
                f"global_blocks: expected numbers from 0 to {self.depth - 1}, the blocks of "
                f"depth={self.depth}, got {self.global_blocks}."
            )

    prunes_in_blocks = False

    @property
    def grid(self) -> int:
        """Side of the output grid."""
        return self.image_size // (MERGE * self.patch_size)

    @property
    def token_width(self) -> int:
        return MERGE**2 * self.block_width

    @property
    def width(self) -> int:
        return MERGE**2 * self.neck_width


class WindowLayout(flax.struct.PyTreeNode):
    """The windows of a block, and what is in their slots.

    Shapes:
        row, column: int[W, S], int[1, W, S] or int[I, W, S]; the place of a slot in its window.
        real: bool[W, S]; False for a slot without a token.
        seen: bool[W, S]; what queries may look at, None for all. In the edge windows of the whole
            grid they look at slots without a token too, which are zeros after the norm.
        sizes: tokens in each window (static).
        side: rows, and columns, of a window (static).
    """

    row: AnyArray
    column: AnyArray
    real: AnyArray
    seen: AnyArray | None
    sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    side: int = flax.struct.field(pytree_node=False)


class Attention(nn.Module):
    """Self-attention inside windows with relative positions, biases everywhere."""

    config: SamConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.qkv = dense(3 * self.config.block_width, dtype=self.dtype)
        self.out = dense(self.config.block_width, dtype=self.dtype)

    def __call__(
        self, x: Array, layout: WindowLayout, relative: dict[str, Array] | None = None
    ) -> Array:
        q, k, v = self._query_key_value(x, layout, relative)
        mixed = attend_windows(q, k, v, real=layout.seen, scale=SCALE)
        return self.out(from_windows(mixed, sizes=layout.sizes).reshape(x.shape))

    def query_key(
        self, x: Array, layout: WindowLayout, relative: dict[str, Array] | None
    ) -> tuple[Array, Array]:
        """Scaled queries and keys with their relative positions, float[I, W, S, H, d + 2R]."""
        return self._query_key_value(x, layout, relative)[:2]

    def _query_key_value(
        self, x: Array, layout: WindowLayout, relative: dict[str, Array] | None
    ) -> tuple[Array, Array, Array]:
        x = to_windows(x, sizes=layout.sizes, length=layout.row.shape[-1])
        qkv = self.qkv(x)
        qkv = qkv.reshape(*qkv.shape[:-1], 3, self.config.num_heads, -1)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        if relative is None:
            return q * q.shape[-1] ** -0.5, k, v
        return *join_relative_positions(q, k, layout=layout, relative=relative), v


def join_relative_positions(
    q: Array, k: Array, *, layout: WindowLayout, relative: dict[str, Array]
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
    side = layout.side
    distance = np.arange(side)[:, None] - np.arange(side) + side - 1
    queries, keys = [q * q.shape[-1] ** -0.5], [k]
    for name, own in (("height", layout.row), ("width", layout.column)):
        entries = relative[name].astype(q.dtype)[distance][own]  # [..., W, S, R, d]
        queries.append(jnp.einsum("...hd,...rd->...hr", q, entries))
        at = jax.nn.one_hot(own, side, dtype=k.dtype)[..., None, :]
        keys.append(jnp.broadcast_to(at, (*k.shape[:-1], side)))
    return jnp.concatenate(queries, axis=-1), jnp.concatenate(keys, axis=-1)


class Block(VitBlock):
    """Biases everywhere, exact GELU. The relative positions may be left out where only parameters
    are made."""

    def make_norm(self) -> nn.Module:
        return layer_norm(self.dtype, epsilon=EPSILON)

    def make_attention(self) -> nn.Module:
        return Attention(self.config, self.dtype)

    def make_mlp(self) -> nn.Module:
        gelu = functools.partial(nn.gelu, approximate=False)
        return Mlp(self.config.block_width, self.config.mlp_dim, gelu, dtype=self.dtype)


class Sam(nn.Module):
    """Images to tokens."""

    config: SamConfig
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

        How steps meet windows and 2×2 merging is our reading, METEOR speaks of neither: a step
        keeps whole 2×2 squares, whose score is their joined features' likeness to the mean square,
        or the mean of the attention that the four receive (inside the windows where the segment's
        last block has them); a window's quota is in proportion to the real tokens it holds; and the
        zeros that fill the edge windows of the whole grid are gone after the first real step.
        Segments are thirds of the blocks, wherever the global ones are: in whole periods, of which
        there are four, they would end at 6, 18 and 24.

        Shapes:
            images: float[I, H, W, 3], H = W.
            context: what the methods of `steps` may need that is not the encoder's own.
            returns: `num_tokens` tokens, or what the last of the `steps` leaves; with
                `all_segments` also the features after each segment, those of the four tokens of a
                square joined.

        Raises:
            ValueError: if a step keeps more tokens than there are, or asks for a CLS token.
        """
        config, context = self.config, context or ReductionContext()
        check_cls(steps, has_cls=False, advice="SAM has none")
        tokens = EncoderTokens.start(self._embed(images), window=config.window // MERGE)
        relative = {kind: self._relative_positions(kind) for kind in (False, True)}
        blocks = Stack(Block, config, config.depth, self.dtype, config.remat, name="blocks")

        def relative_of(start: int, stop: int, is_global: bool) -> dict[str, Array]:
            """Those of the blocks of a kind in `[start, stop)`."""
            before, after = (
                sum((b in config.global_blocks) == is_global for b in range(end))
                for end in (start, stop)
            )
            return jax.tree.map(lambda table: table[before:after], relative[is_global])

        passed = []
        for segment in split_depth(config, steps, all_segments=all_segments):
            start, stop, last = segment.start, segment.stop, segment.last_block
            layouts = tuple(self._layout(tokens, is_global) for is_global in (False, True))
            out = blocks.alternate(
                unmerge_2x2(tokens.x),
                runs=tuple(contiguous_runs(start, stop, global_blocks=config.global_blocks)),
                aux=tuple((layout,) for layout in layouts),
                per_layer=tuple((relative_of(start, stop, kind),) for kind in (False, True)),
            )
            tokens = tokens.replace(x=merge_2x2(out.x))
            for step in segment.after:
                seen = context
                if drops(step, tokens) and "attention_received" in step.method.needs:
                    is_global = last in config.global_blocks
                    own = jax.tree.map(lambda t: t[0], relative_of(last, last + 1, is_global))
                    received = _attention_received(
                        blocks, segment, out.last_input, layouts[is_global], own
                    )
                    received = received.reshape(*tokens.patch_index.shape, MERGE**2).mean(-1)
                    seen = context.replace(attention_received=received)
                tokens = prune_tokens(tokens, step, context=seen)
            passed.append((segment, tokens))
        out = finish(passed, num_tokens=config.num_tokens)
        return out.replace(x=self._neck(out.x))

    def _embed(self, images: Array) -> Array:
        """Patches with their positions, joined in squares, float[I, N, 4E]."""
        config = self.config
        images = resize(images, size=config.image_size).astype(self.dtype)
        patches = patchify(images, patch=config.patch_size)
        x = dense(config.block_width, dtype=self.dtype, name="patch_embedding")(patches)
        init = nn.initializers.normal(0.02)
        position = self.param("position_embedding", init, x.shape[1:])
        x = patchify(x + position.astype(self.dtype), patch=MERGE)
        return constrain(x.reshape(x.shape[0], config.num_tokens, -1), "btd")

    def _relative_positions(self, is_global: bool) -> dict[str, Array]:
        """The tables of all blocks of a kind, by axis."""
        config = self.config
        num_global = len(config.global_blocks)
        name, num_blocks, side = "relative_window", config.depth - num_global, config.window
        if is_global:
            name, num_blocks, side = "relative_global", num_global, MERGE * config.grid
        shape = (num_blocks, 2 * side - 1, config.block_width // config.num_heads)
        zeros = nn.initializers.zeros
        return self.param(
            name, lambda key: {axis: zeros(key, shape) for axis in ("height", "width")}
        )

    def _layout(self, tokens: EncoderTokens, is_global: bool) -> WindowLayout:
        grid, window = self.config.grid, self.config.window // MERGE
        sizes, patch_index = tokens.window_sizes, tokens.patch_index
        whole = patch_index.shape[1] == self.config.num_tokens
        if is_global:
            sizes, window = (patch_index.shape[1],), grid
            if whole:  # all images have the same tokens
                patch_index = patch_index[:1]
        if whole and not is_global:
            row, column = padded_windows(grid, window)
        else:
            row, column = (
                to_windows(place, sizes=sizes, length=max(sizes))
                for place in (patch_index // grid, patch_index % grid)
            )
        _, real = window_slots(sizes, length=row.shape[-1])
        real = np.repeat(real, MERGE**2, axis=-1)
        dy, dx = np.divmod(np.arange(MERGE**2), MERGE)
        return WindowLayout(
            row=(MERGE * (row % window)[..., None] + dy).reshape(*row.shape[:-1], -1),
            column=(MERGE * (column % window)[..., None] + dx).reshape(*row.shape[:-1], -1),
            real=real,
            seen=None if whole or real.all() else real,
            sizes=tuple(MERGE**2 * size for size in sizes),
            side=MERGE * window,
        )

    def _neck(self, x: Array) -> Array:
        """Joined squares float[I, N, 4E] to what comes out, the channel slowest, then the row and
        the column in the square (PyTorch's pixel_unshuffle)."""
        neck = dense(self.config.neck_width, use_bias=False, dtype=self.dtype, name="neck")
        x = layer_norm(self.dtype, epsilon=EPSILON, name="neck_norm")(neck(unmerge_2x2(x)))
        x = x.reshape(x.shape[0], -1, MERGE**2, self.config.neck_width)
        return x.swapaxes(2, 3).reshape(x.shape[0], -1, self.config.width)


@jax.named_scope("scores")
def _attention_received(
    blocks: Stack,
    segment: Segment,
    x: Array,
    layout: WindowLayout,
    relative: dict[str, Array],
) -> Array:
    """float32[I, 4N]: what each token gets in the last block of a segment, whose input is x."""
    q, k = blocks.layer(segment.last_block, x, layout, relative, method="query_key")
    received = received_in_windows(q, k, rows=layout.real, real=layout.seen, scale=SCALE)
    return from_windows(received, sizes=layout.sizes)


def unmerge_2x2(x: Array) -> Array:
    """float[I, N, 4E] → float[I, 4N, E]: the four tokens of a square one after the other."""
    return x.reshape(x.shape[0], MERGE**2 * x.shape[1], -1)


def merge_2x2(x: Array) -> Array:
    """float[I, 4N, E] → float[I, N, 4E]."""
    return x.reshape(x.shape[0], x.shape[1] // MERGE**2, -1)


def padded_windows(grid: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """int[W, window²], rows and columns of the slots of windows over a grid that is padded at its
    far edges: real places first, in the order of `window_order`, then the padding."""
    side = -(-grid // window) * window
    row, column = np.divmod(np.arange(side**2), side)
    padding = (row >= grid) | (column >= grid)
    order = np.lexsort((column, row, padding, column // window, row // window))
    return row[order].reshape(-1, window**2), column[order].reshape(-1, window**2)
