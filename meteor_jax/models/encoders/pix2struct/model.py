"""Pix2Struct's image encoder (Lee et al. 2023, arXiv 2210.03347), as EAGLE runs it.

It reads its own pixels: grey levels standardised image by image, resized with antialiasing, cut
into patches that carry a row and a column id counted from 1.

I images, N tokens, E width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from meteor_jax.models.encoders.sizes import TransformerSizes, check_multiple
from meteor_jax.models.encoders.tokens import (
    EncoderOutput,
    EncoderTokens,
    check_cls,
    finish,
    run_segment,
    split_depth,
)
from meteor_jax.models.layers.resize import IMAGE_MEAN, IMAGE_STD, patchify, resize
from meteor_jax.models.layers.stack import Stack, constrain, dense
from meteor_jax.models.layers.vit_block import GatedMlp, SelfAttention, VitBlock
from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.method import ReductionContext
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

    type: Literal["pix2struct"] = "pix2struct"
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


class Block(VitBlock):
    """RMS norms, no biases, gated GELU."""

    def make_norm(self) -> nn.Module:
        return nn.RMSNorm(epsilon=EPSILON, dtype=self.dtype)

    def make_attention(self) -> nn.Module:
        width, num_heads = self.config.width, self.config.num_heads
        return SelfAttention(
            width,
            num_heads,
            use_bias=False,
            scale=ATTENTION_SCALE,
            # T5's initialiser: logits start at unit variance without a scale in the attention.
            query_init=nn.initializers.normal((width * (width // num_heads)) ** -0.5),
            dtype=self.dtype,
        )

    def make_mlp(self) -> nn.Module:
        width, hidden = self.config.width, self.config.mlp_dim
        return GatedMlp(width, hidden, gated_gelu, use_bias=False, dtype=self.dtype)


def gated_gelu(gate: Array, up: Array) -> Array:
    """gelu_tanh(gate) · up."""
    return nn.gelu(gate, approximate=True) * up


class Pix2Struct(nn.Module):
    """Images to tokens."""

    config: Pix2StructConfig
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

        Shapes:
            images: float[I, H, W, 3], H = W.
            context: what the methods of `steps` may need that is not the encoder's own.
            returns: `num_tokens` tokens, or what the last of the `steps` leaves; with
                `all_segments` also the features after each segment.

        Raises:
            ValueError: if a step keeps more tokens than there are, or asks for a CLS token.
        """
        config, context = self.config, context or ReductionContext()
        check_cls(steps, has_cls=False, advice="Pix2Struct has none")
        tokens = EncoderTokens.start(self._embed(images))
        blocks = Stack(Block, config, config.depth, self.dtype, config.remat, name="blocks")
        passed = []
        for segment in split_depth(config, steps, all_segments=all_segments):
            tokens = run_segment(blocks, tokens, segment, context=context, scale=ATTENTION_SCALE)
            passed.append((segment, tokens))
        out = finish(passed, num_tokens=config.num_tokens)
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
