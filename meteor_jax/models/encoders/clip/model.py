"""CLIP's vision transformer, as EAGLE runs it: no CLS token in the blocks, no norm after them.

The order is: patches, positions, norm, blocks. Source: CLIP ViT-L/14-336 (Radford et al. 2021,
arXiv 2103.00020); NVlabs/EAGLE drops the CLS token after its position is added.

I images, N tokens, E width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from meteor_jax.models.encoders.sizes import TransformerSizes, check_multiple
from meteor_jax.models.layers.attention import attend, attention_received
from meteor_jax.models.layers.remat import save_as
from meteor_jax.models.layers.resize import patchify, resize
from meteor_jax.models.layers.stack import Stack, StackOutput, constrain, dense
from meteor_jax.pruning.encode import (
    EncoderCut,
    EncoderOutput,
    EncoderState,
    encode_segments,
)
from meteor_jax.types import Array

EPSILON = 1e-5


@dataclass(frozen=True)
class ClipConfig(TransformerSizes):
    """Sizes; the defaults are ViT-L/14 at 336 pixels.

    Attributes:
        image_size: pixels that the encoder sees; the image is resized to it.
        keep_cls: keeps a CLS token beside the patches, so that the criterion "cls" can ask it.
            It is not among the tokens that come out. EAGLE's checkpoints run without it.
        position_side: side of the grid that the position embedding was trained on, resampled to
            the grid in use (bicubic, antialiased); 0 where they are the same. EAGLE's tower called
            "clip-448" runs at 336; image_size=448 with position_side=24 is what its name says.
        remat: see `Stack`.
    """

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


class Attention(nn.Module):
    """Self-attention over all tokens, biases everywhere."""

    config: ClipConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        width = self.config.width
        self.query = dense(width, dtype=self.dtype)
        self.key = dense(width, dtype=self.dtype)
        self.value = dense(width, dtype=self.dtype)
        self.out = dense(width, dtype=self.dtype)

    def __call__(self, x: Array) -> Array:
        q, k = self.query_key(x)
        return self.out(attend(q, k, self._heads(self.value(x))).reshape(x.shape))

    def query_key(self, x: Array) -> tuple[Array, Array]:
        """Queries and keys before the scale 1/√d, float[I, N, H, d] each."""
        return self._heads(self.query(x)), self._heads(self.key(x))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, -1)


class MLP(nn.Module):
    """Two layers with QuickGELU between them."""

    config: ClipConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = save_as("mlp", dense(self.config.mlp_dim, dtype=self.dtype, name="fc1")(x))
        return dense(self.config.width, dtype=self.dtype, name="fc2")(quick_gelu(x))


class Block(nn.Module):
    """A pre-norm transformer block."""

    config: ClipConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.norm1 = layer_norm(self.dtype)
        self.attention = Attention(self.config, self.dtype)
        self.norm2 = layer_norm(self.dtype)
        self.mlp = MLP(self.config, self.dtype)

    def __call__(self, x: Array) -> tuple[Array, None]:
        x = save_as("residual", x + self.attention(self.norm1(x)))
        x = x + self.mlp(self.norm2(x))
        return constrain(x, "btd"), None

    def query_key(self, x: Array) -> tuple[Array, Array]:
        """Queries and keys of the block's attention, from the block's input."""
        return self.attention.query_key(self.norm1(x))


class Clip(nn.Module):
    """Images to tokens."""

    config: ClipConfig
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
                asks for the CLS token of an encoder that has none.
        """
        config = self.config
        num_prefix = int(config.keep_cls)
        if not config.keep_cls and any(cut.criterion == "cls" for cut in cuts or ()):
            raise ValueError("criterion 'cls' needs keep_cls=True; or use 'attention'.")

        x = self._embed(images)
        stack = Stack(Block, config, config.depth, self.dtype, config.remat, name="blocks")

        def run(tokens: EncoderState, start: int, stop: int) -> StackOutput:
            return stack(tokens.x, start=start, stop=stop)

        def attention(block: int, tokens: EncoderState, criterion: str) -> Array:
            q, k = stack.layer(block, tokens.x, method="query_key")
            rows = jnp.ones(q.shape[:2])
            if criterion == "cls":
                rows = rows.at[:, 1:].set(0.0)
            return attention_received(q, k, row_weight=rows).mean(1)[:, num_prefix:]

        return encode_segments(
            x,
            cuts=cuts,
            bounds=config.segment_ends,
            run=run,
            attention=attention,
            num_prefix=num_prefix,
            image_seed=image_seed,
        )

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
        x = layer_norm(self.dtype, name="pre_norm")(x + position.astype(self.dtype))
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


def layer_norm(dtype: Any, *, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=EPSILON, dtype=dtype, use_fast_variance=False, name=name)
