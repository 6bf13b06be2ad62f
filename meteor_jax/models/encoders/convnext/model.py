"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545) as EAGLE runs it: no norm after the last stage.

Its grid stays dense, so tokens can be cut at its output only.

I images, H W the grid of a stage, C channels of a stage, E width of the last stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from meteor_jax.models.layers.platform import target_platform
from meteor_jax.models.layers.remat import save_as
from meteor_jax.models.layers.resize import patchify, resize
from meteor_jax.models.layers.stack import Stack, constrain, dense
from meteor_jax.pruning.encode import EncoderCut, EncoderOutput, check_cuts, cut_tokens
from meteor_jax.types import Array

EPSILON = 1e-5
STEM = 4  # side of the stem's patches
KERNEL = 7  # side of the depthwise kernel
SHARDING_RULES = ((r"(stem|downsample\d+|depthwise)/kernel$", ("fsdp",)),)


@dataclass(frozen=True)
class ConvNextConfig:
    """Sizes; the defaults are ConvNeXt-XXLarge at 1,024 pixels. Any number of stages will do.

    Attributes:
        image_size: pixels that the encoder sees; the image is resized to it.
        depths, widths: blocks and channels of each stage.
        layer_scale_init: what each block's output is first multiplied by. A net that starts from
            nothing and trains for minutes wants 0.1 to 1.
        remat: see `Stack`.
    """

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
    def grid(self) -> int:
        """Side of the output grid."""
        return self.image_size // self.stride

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def cuttable(self) -> tuple[bool, bool, bool]:
        """At which boundaries tokens can be dropped."""
        return (False, False, True)

    @property
    def num_windows(self) -> int:
        return 1

    @property
    def has_attention(self) -> bool:
        return False


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
        y = layer_norm(self.dtype, name="norm")(y)
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
        cuts: tuple[EncoderCut, ...] | None = None,
        image_seed: Array | None = None,
    ) -> EncoderOutput:
        """Encodes images of any size, normalised with CLIP's mean and standard deviation.

        Shapes:
            images: float[I, H, W, 3], H = W.
            image_seed: uint32[I], a hash of each image, for cuts by "random".
            returns: `num_tokens` tokens, or as many as the last of the three `cuts` keeps; the
                first two must keep all.

        Raises:
            ValueError: if there are not three cuts, one of the first two drops tokens, or the
                last keeps more than there are or wants attention.
        """
        config = self.config
        x = resize(images, size=config.image_size).astype(self.dtype)
        x = patchify(x, patch=STEM)
        x = dense(config.widths[0], dtype=self.dtype, name="stem")(x)
        x = constrain(layer_norm(self.dtype, name="stem_norm")(x), "bhwd")
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            if stage:
                x = layer_norm(self.dtype, name=f"downsample{stage}_norm")(x)
                x = patchify(x, patch=2)
                x = dense(width, dtype=self.dtype, name=f"downsample{stage}")(x)
            stage_config = StageConfig(width, config.layer_scale_init)
            x = Stack(Block, stage_config, depth, self.dtype, config.remat, name=f"stage{stage}")(
                x
            ).x

        x = x.reshape(x.shape[0], -1, config.width)
        num_tokens = x.shape[1]
        raster = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), x.shape[:2])
        if cuts is None:
            return EncoderOutput(x=x, raster=raster)
        check_cuts(cuts)
        early = [cut.keep for cut in cuts[:-1]]
        if any(keep != num_tokens for keep in early):
            raise ValueError(
                f"cuts: ConvNeXt can drop tokens at its output only; expected the first two to "
                f"keep all {num_tokens}, got {early}."
            )
        # Its grid is whole until the output, so that is what it holds at every boundary.
        kept, last = cut_tokens(x, raster, cut=cuts[-1], image_seed=image_seed)
        return EncoderOutput(
            x=kept, raster=last, kept=(raster, raster, last), features=(x, x, kept)
        )


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
    by_kernel = _sum_shifted(x.astype(jnp.float32), dkernel.astype(jnp.float32))
    return depthwise_conv(x, kernel), depthwise_conv(dx, kernel) + by_kernel.astype(x.dtype)


def _sum_shifted(x: Array, kernel: Array) -> Array:
    """The depthwise convolution as a sum of shifted products."""
    height, width = x.shape[1:3]
    padded = _pad(x)
    total = jnp.zeros_like(x)
    for row in range(KERNEL):
        for column in range(KERNEL):
            window = padded[:, row : row + height, column : column + width]
            total += window * kernel[row, column, 0]
    return total


@jax.custom_jvp
def depthwise_shifted(x: Array, kernel: Array) -> Array:
    """The depthwise convolution as a sum of shifted products, which CPUs run far faster.

    Differentiating the sum is ten times slower than it, so its derivatives are written in forms
    whose transposes, which are the gradients, are fast.
    """
    return _sum_shifted(x, kernel)


@depthwise_shifted.defjvp
def _depthwise_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    return _sum_shifted(x, kernel), _sum_placed(dx, kernel) + _sum_rows(x, dkernel)


def _sum_placed(x: Array, kernel: Array) -> Array:
    """The depthwise convolution that places every product instead of fetching it: transposed, it
    fetches, which is `_sum_shifted`."""
    height, width = x.shape[1:3]
    total = 0
    for row in range(KERNEL):
        for column in range(KERNEL):
            rows, columns = (KERNEL - 1 - row, row), (KERNEL - 1 - column, column)
            total += jnp.pad(x * kernel[row, column, 0], ((0, 0), rows, columns, (0, 0)))
    margin = KERNEL // 2
    return total[:, margin : margin + height, margin : margin + width]


def _sum_rows(x: Array, kernel: Array) -> Array:
    """The depthwise convolution row by row. Transposed by the kernel, each step is a plain
    elementwise product, added to one total a kernel column, [kernel row, W, C]; the sums over W
    come last."""
    num_images, height, width, channels = x.shape
    padded = _pad(x)
    columns = jnp.broadcast_to(
        kernel.astype(jnp.float32)[:, :, 0, None], (KERNEL, KERNEL, width, channels)
    )
    columns = tuple(columns[:, column] for column in range(KERNEL))

    def line(_: None, place: Array) -> tuple[None, Array]:
        image, row = place // height, place % height
        sizes = (1, KERNEL, padded.shape[2], channels)
        band = jax.lax.dynamic_slice(padded, (image, row, 0, 0), sizes)[0].astype(jnp.float32)
        return None, sum(
            (band[:, i : i + width] * column).sum(0) for i, column in enumerate(columns)
        ).astype(x.dtype)

    _, lines = jax.lax.scan(line, None, jnp.arange(num_images * height))
    return lines.reshape(x.shape)


def _pad(x: Array) -> Array:
    margin = KERNEL // 2
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def layer_norm(dtype: Any, *, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=EPSILON, dtype=dtype, use_fast_variance=False, name=name)
