"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545) as EAGLE runs it: no norm after the last stage.

Its grid stays dense, so tokens can be dropped at its end only.

I images, H W the grid of a stage, C channels of a stage, E width of the last stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from meteor_jax.models.encoders.sizes import EncoderConfig
from meteor_jax.models.encoders.tokens import (
    EncoderOutput,
    EncoderTokens,
    drops,
    finish,
    prune_tokens,
    split_depth,
)
from meteor_jax.models.layers.kernels.cpu import depthwise_shifted, sum_shifted
from meteor_jax.models.layers.platform import target_platform
from meteor_jax.models.layers.remat import save_as
from meteor_jax.models.layers.resize import patchify, resize
from meteor_jax.models.layers.stack import Stack, constrain, dense
from meteor_jax.models.layers.vit_block import layer_norm
from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.method import ReductionContext
from meteor_jax.pruning.points import NUM_SEGMENTS
from meteor_jax.types import Array

EPSILON = 1e-5
STEM = 4  # side of the stem's patches
KERNEL = 7  # side of the depthwise kernel
SHARDING_RULES = ((r"(stem|downsample\d+|depthwise)/kernel$", ("fsdp",)),)


@dataclass(frozen=True)
class ConvNextConfig(EncoderConfig):
    """Sizes; the defaults are ConvNeXt-XXLarge at 1,024 pixels. Any number of stages will do.

    Attributes:
        image_size: pixels that the encoder sees; the image is resized to it.
        depths, widths: blocks and channels of each stage.
        layer_scale_init: what each block's output is first multiplied by. A net that starts from
            nothing and trains for minutes wants 0.1 to 1.
        remat: see `Stack`.
    """

    type: Literal["convnext"] = "convnext"
    image_size: int = 1024
    depths: tuple[int, ...] = (3, 4, 30, 3)
    widths: tuple[int, ...] = (384, 768, 1536, 3072)
    layer_scale_init: float = 1e-6
    remat: str = "none"

    def __post_init__(self) -> None:
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                "depths and widths: expected one number a stage each, "
                f"got {self.depths} and {self.widths}."
            )
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size: expected a multiple of {self.stride}, the stride of "
                f"{len(self.depths)} stages, got {self.image_size}."
            )

    @property
    def stride(self) -> int:
        """Pixels to one side of an output token."""
        return STEM * 2 ** (len(self.depths) - 1)

    @property
    def width(self) -> int:
        return self.widths[-1]

    @property
    def token_width(self) -> int:
        return self.width

    @property
    def grid(self) -> int:
        """Side of the output grid."""
        return self.image_size // self.stride

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def prunable(self) -> tuple[bool, bool, bool]:
        """After which segments tokens can be dropped."""
        return (False, False, True)

    num_windows = 1
    prunes_in_blocks = False

    @property
    def depth(self) -> int:
        return sum(self.depths)

    @property
    def segment_ends(self) -> tuple[int, ...]:
        """After all blocks: the grid is whole until then."""
        return (self.depth,) * NUM_SEGMENTS


@dataclass(frozen=True)
class StageConfig:
    """What the blocks of one stage need to know."""

    width: int
    layer_scale_init: float


class DepthwiseConv(nn.Module):
    """A 7×7 convolution of each channel with its own kernel, zeros outside, grid kept."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        init = nn.initializers.lecun_normal(in_axis=(0, 1))
        kernel = self.param("kernel", init, (KERNEL, KERNEL, 1, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return depthwise(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


class Block(nn.Module):
    """Depthwise convolution, norm, MLP with exact GELU, layer scale, residual."""

    config: StageConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        width = self.config.width
        y = DepthwiseConv(self.dtype, name="depthwise")(x)
        y = layer_norm(self.dtype, epsilon=EPSILON, name="norm")(y)
        y = save_as("mlp", dense(4 * width, dtype=self.dtype, name="fc1")(y))
        y = dense(width, dtype=self.dtype, name="fc2")(gelu(y))
        init = nn.initializers.constant(self.config.layer_scale_init)
        scale = self.param("layer_scale", init, (width,))
        return constrain(x + y * scale.astype(self.dtype), "bhwd"), None


class ConvNext(nn.Module):
    """Images to tokens."""

    config: ConvNextConfig
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
            returns: `num_tokens` tokens, or what the last of the `steps` leaves, which can be at
                the end only; with `all_segments` also the features after each segment. The grid is
                whole until the end, so these are the output's three times.

        Raises:
            ValueError: if a step before the end drops tokens, or one keeps more than there are.
        """
        config = self.config
        x = resize(images, size=config.image_size).astype(self.dtype)
        x = patchify(x, patch=STEM)
        x = dense(config.widths[0], dtype=self.dtype, name="stem")(x)
        x = constrain(layer_norm(self.dtype, epsilon=EPSILON, name="stem_norm")(x), "bhwd")
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            if stage:
                x = layer_norm(self.dtype, epsilon=EPSILON, name=f"downsample{stage}_norm")(x)
                x = patchify(x, patch=2)
                x = dense(width, dtype=self.dtype, name=f"downsample{stage}")(x)
            stage_config = StageConfig(width, config.layer_scale_init)
            x = Stack(Block, stage_config, depth, self.dtype, config.remat, name=f"stage{stage}")(
                x
            ).x

        tokens = EncoderTokens.start(x.reshape(x.shape[0], -1, config.width))
        passed = []
        for segment in split_depth(config, steps, all_segments=all_segments):
            for step in segment.after:
                if segment.number < NUM_SEGMENTS and drops(step, tokens):
                    raise ValueError(
                        f"{step.point}: ConvNeXt can drop tokens at its end only; keep all "
                        f"{config.num_tokens} there."
                    )
                tokens = prune_tokens(tokens, step, context=context or ReductionContext())
            passed.append((segment, tokens))
        return finish(passed, num_tokens=config.num_tokens)


def gelu(x: Array) -> Array:
    """Exact GELU by erf; `jax.nn.gelu`'s erfc takes a CPU three times as long."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def depthwise(x: Array, kernel: Array) -> Array:
    """Depthwise convolution in the form that is fast on the target platform.

    Shapes:
        x: float[I, H, W, C]; kernel: float[7, 7, 1, C].
    """
    forms = {"cpu": depthwise_shifted, "tpu": depthwise_conv_tpu}
    return forms.get(target_platform(), depthwise_conv)(x, kernel)


def depthwise_conv(x: Array, kernel: Array) -> Array:
    """The depthwise convolution as XLA's grouped convolution."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@jax.custom_jvp
def depthwise_conv_tpu(x: Array, kernel: Array) -> Array:
    """`depthwise_conv` whose kernel's gradient is sums of shifted products: as a convolution of
    one group a channel, XLA takes minutes to compile each for a TPU."""
    return depthwise_conv(x, kernel)


@depthwise_conv_tpu.defjvp
def _conv_tpu_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    by_kernel = sum_shifted(x.astype(jnp.float32), dkernel.astype(jnp.float32))
    return depthwise_conv(x, kernel), depthwise_conv(dx, kernel) + by_kernel.astype(x.dtype)
