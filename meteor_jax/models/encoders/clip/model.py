"""CLIP's vision transformer, as EAGLE runs it: no CLS token in the blocks, no norm after them.

The order is: patches, positions, norm, blocks. Source: CLIP ViT-L/14-336 (Radford et al. 2021,
arXiv 2103.00020); NVlabs/EAGLE drops the CLS token after its position is added.

I images, N tokens, E width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
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
from meteor_jax.models.layers.resize import patchify, resize
from meteor_jax.models.layers.stack import Stack, constrain, dense
from meteor_jax.models.layers.vit_block import Mlp, SelfAttention, VitBlock, layer_norm
from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.method import ReductionContext
from meteor_jax.types import Array

EPSILON = 1e-5


@dataclass(frozen=True)
class ClipConfig(TransformerSizes):
    """Sizes; the defaults are ViT-L/14 at 336 pixels.

    Attributes:
        image_size: pixels that the encoder sees; the image is resized to it.
        keep_cls: keeps a CLS token beside the patches, so that a method can ask for its attention.
            It is not among the tokens that come out. EAGLE's checkpoints run without it.
        position_side: side of the grid that the position embedding was trained on, resampled to
            the grid in use (bicubic, antialiased); 0 where they are the same. EAGLE's tower called
            "clip-448" runs at 336; image_size=448 with position_side=24 is what its name says.
        remat: see `Stack`.
    """

    type: Literal["clip"] = "clip"
    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    keep_cls: bool = False
    position_side: int = 0
    remat: str = "none"

    def __post_init__(self) -> None:
        check_multiple("image_size", self.image_size, of="patch_size", factor=self.patch_size)
        check_multiple("width", self.width, of="num_heads", factor=self.num_heads)

    @property
    def grid(self) -> int:
        """Side of the output grid."""
        return self.image_size // self.patch_size


class Block(VitBlock):
    """Biases everywhere, QuickGELU."""

    def make_norm(self) -> nn.Module:
        return layer_norm(self.dtype, epsilon=EPSILON)

    def make_attention(self) -> nn.Module:
        return SelfAttention(self.config.width, self.config.num_heads, dtype=self.dtype)

    def make_mlp(self) -> nn.Module:
        return Mlp(self.config.width, self.config.mlp_dim, quick_gelu, dtype=self.dtype)


class Clip(nn.Module):
    """Images to tokens."""

    config: ClipConfig
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
            ValueError: if a step keeps more tokens than there are, or asks for the CLS token of an
                encoder that has none.
        """
        config, context = self.config, context or ReductionContext()
        check_cls(steps, has_cls=config.keep_cls, advice="needs keep_cls=True")
        tokens = EncoderTokens.start(self._embed(images), num_prefix=int(config.keep_cls))
        blocks = Stack(Block, config, config.depth, self.dtype, config.remat, name="blocks")
        passed = []
        for segment in split_depth(config, steps, all_segments=all_segments):
            tokens = run_segment(blocks, tokens, segment, context=context)
            passed.append((segment, tokens))
        return finish(passed, num_tokens=config.num_tokens)

    def _embed(self, images: Array) -> Array:
        """Patches with their positions, float[I, N, E], after CLS if there is one."""
        config = self.config
        images = resize(images, size=config.image_size).astype(self.dtype)
        patches = patchify(images, patch=config.patch_size)
        embed = dense(config.width, use_bias=False, dtype=self.dtype, name="patch_embedding")
        x = embed(patches)
        x = x.reshape(x.shape[0], -1, config.width)
        init = nn.initializers.normal(config.width**-0.5)
        if config.keep_cls:
            cls = self.param("class_embedding", init, (config.width,)).astype(self.dtype)
            cls = jnp.broadcast_to(cls, (x.shape[0], 1, config.width))
            x = jnp.concatenate([cls, x], axis=1)
        position = self._position(init)
        x = layer_norm(self.dtype, epsilon=EPSILON, name="pre_norm")(
            x + position.astype(self.dtype)
        )
        return constrain(x, "btd")

    def _position(self, init: Any) -> Array:
        """float32[P + N, E], of P = 1 CLS token if there is one, and the N patches."""
        config = self.config
        side, num_prefix = config.position_side or config.grid, int(config.keep_cls)
        table = self.param("position_embedding", init, (num_prefix + side**2, config.width))
        square = table[num_prefix:].reshape(side, side, -1)
        patches = resize(square, size=config.grid, method="bicubic_antialias")
        return jnp.concatenate([table[:num_prefix], patches.reshape(-1, config.width)])


def quick_gelu(x: Array) -> Array:
    """x · σ(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)
