"""Pix2Struct's image encoder (Lee et al. 2023, arXiv 2210.03347), as EAGLE runs it.

It reads its own pixels: grey levels standardised image by image, resized with antialiasing, cut
into patches that carry a row and a column id counted from 1.

I images, N tokens, E width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from meteor_jax.models.encoders.sizes import TransformerSizes, check_multiple
from meteor_jax.models.layers.attention import attend, attention_received
from meteor_jax.models.layers.remat import save_as
from meteor_jax.models.layers.resize import IMAGE_MEAN, IMAGE_STD, patchify, resize
from meteor_jax.models.layers.stack import Stack, StackOutput, constrain, dense
from meteor_jax.pruning.encode import (
    EncoderCut,
    EncoderOutput,
    EncoderState,
    encode_segments,
)
from meteor_jax.types import Array

EPSILON = 1e-6
ATTENTION_SCALE = 1.0  # as in T5, the usual 1/√d is in the initialiser instead


@dataclass(frozen=True)
class Pix2StructConfig(TransformerSizes):
    """Sizes; the defaults are Pix2Struct-Large with the 45×45 patches that EAGLE gives it.

    Attributes:
        grid_side: rows and columns of patches; the image is resized to `grid_side · patch_size`.
        num_positions: rows in each table of row and column ids; more than `grid_side`.
        remat: see `Stack`.
    """

    grid_side: int = 45
    patch_size: int = 16
    width: int = 1536
    depth: int = 18
    num_heads: int = 24
    mlp_dim: int = 3968
    num_positions: int = 4096
    remat: str = "none"

    def __post_init__(self) -> None:
        check_multiple("width", self.width, of="num_heads", factor=self.num_heads)
        if self.num_positions <= self.grid_side:
            raise ValueError(
                f"num_positions: expected more than grid_side {self.grid_side} (ids count from "
                f"1), got {self.num_positions}."
            )

    @property
    def image_size(self) -> int:
        return self.grid_side * self.patch_size

    @property
    def grid(self) -> int:
        """Side of the output grid."""
        return self.grid_side


class Attention(nn.Module):
    """Self-attention over all tokens, without biases and without a scale."""

    config: Pix2StructConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        width, head_dim = self.config.width, self.config.width // self.config.num_heads
        # T5's initialiser: logits start at unit variance without a scale in the attention.
        query_init = nn.initializers.normal((width * head_dim) ** -0.5)
        self.query = dense(width, use_bias=False, dtype=self.dtype, kernel_init=query_init)
        self.key = dense(width, use_bias=False, dtype=self.dtype)
        self.value = dense(width, use_bias=False, dtype=self.dtype)
        self.out = dense(width, use_bias=False, dtype=self.dtype)

    def __call__(self, x: Array) -> Array:
        q, k = self.query_key(x)
        mixed = attend(q, k, self._heads(self.value(x)), scale=ATTENTION_SCALE)
        return self.out(mixed.reshape(x.shape))

    def query_key(self, x: Array) -> tuple[Array, Array]:
        """Queries and keys, float[I, N, H, d] each."""
        return self._heads(self.query(x)), self._heads(self.key(x))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, -1)


class GatedMLP(nn.Module):
    """out(gelu_tanh(gate(x)) · up(x)), without biases."""

    config: Pix2StructConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = self.config.mlp_dim
        gate = save_as("mlp", dense(hidden, use_bias=False, dtype=self.dtype, name="gate")(x))
        up = save_as("mlp", dense(hidden, use_bias=False, dtype=self.dtype, name="up")(x))
        x = nn.gelu(gate, approximate=True) * up
        return dense(self.config.width, use_bias=False, dtype=self.dtype, name="out")(x)


class Block(nn.Module):
    """A pre-norm transformer block with RMS norms."""

    config: Pix2StructConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.norm1 = nn.RMSNorm(epsilon=EPSILON, dtype=self.dtype)
        self.attention = Attention(self.config, self.dtype)
        self.norm2 = nn.RMSNorm(epsilon=EPSILON, dtype=self.dtype)
        self.mlp = GatedMLP(self.config, self.dtype)

    def __call__(self, x: Array) -> tuple[Array, None]:
        x = save_as("residual", x + self.attention(self.norm1(x)))
        x = x + self.mlp(self.norm2(x))
        return constrain(x, "btd"), None

    def query_key(self, x: Array) -> tuple[Array, Array]:
        """Queries and keys of the block's attention, from the block's input."""
        return self.attention.query_key(self.norm1(x))


class Pix2Struct(nn.Module):
    """Images to tokens."""

    config: Pix2StructConfig
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

        Shapes:
            images: float[I, H, W, 3], H = W.
            image_seed: uint32[I], a hash of each image, for cuts by "random".
            returns: `num_tokens` tokens, or as many as the last of the three `cuts` keeps.

        Raises:
            ValueError: if there are not three cuts, one keeps more tokens than there are, or one
                asks for a CLS token.
        """
        config = self.config
        if any(cut.criterion == "cls" for cut in cuts or ()):
            raise ValueError("criterion 'cls': Pix2Struct has no CLS token; use 'attention'.")

        x = self._embed(images)
        stack = Stack(Block, config, config.depth, self.dtype, config.remat, name="blocks")

        def run(tokens: EncoderState, start: int, stop: int) -> StackOutput:
            return stack(tokens.x, start=start, stop=stop)

        def attention(block: int, tokens: EncoderState, criterion: str) -> Array:
            q, k = stack.layer(block, tokens.x, method="query_key")
            rows = jnp.ones(q.shape[:2])
            return attention_received(q, k, row_weight=rows, scale=ATTENTION_SCALE).mean(1)

        out = encode_segments(
            x,
            cuts=cuts,
            bounds=config.segment_ends,
            run=run,
            attention=attention,
            image_seed=image_seed,
        )
        norm = nn.RMSNorm(epsilon=EPSILON, dtype=self.dtype, name="final_norm")
        return out.replace(x=norm(out.x))

    def _embed(self, images: Array) -> Array:
        """Patches with their rows and columns, float[I, N, E]."""
        config = self.config
        patches = patchify(preprocess(images, size=config.image_size), patch=config.patch_size)
        x = dense(config.width, dtype=self.dtype, name="patch_embedding")(
            patches.astype(self.dtype)
        )
        # Row and column together as loud as a patch of standardised pixels.
        init = nn.initializers.normal(0.7)
        shape = (config.num_positions, config.width)
        rows = self.param("row_embedding", init, shape).astype(self.dtype)
        columns = self.param("column_embedding", init, shape).astype(self.dtype)
        ids = slice(1, config.grid_side + 1)
        x = x + rows[ids][:, None] + columns[ids][None, :]
        return constrain(x.reshape(x.shape[0], -1, config.width), "btd")


def preprocess(images: Array, *, size: int) -> Array:
    """Back to grey levels, standardised over all pixels and channels of an image, resized.

    Shapes:
        images: float[I, H, W, 3], normalised with CLIP's mean and standard deviation.
        returns: float32[I, size, size, 3].
    """
    x = (images.astype(jnp.float32) * jnp.asarray(IMAGE_STD) + jnp.asarray(IMAGE_MEAN)) * 255.0
    num_values = images.shape[1] * images.shape[2] * images.shape[3]
    mean = x.mean((1, 2, 3), keepdims=True)
    std = jnp.maximum(x.std((1, 2, 3), keepdims=True), num_values**-0.5)
    return resize((x - mean) / std, size=size, method="bilinear_antialias")
