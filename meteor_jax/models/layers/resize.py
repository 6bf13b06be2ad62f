"""Resizing inside the compiled program, as products with precomputed matrices.

A separable resize is two matrix products, rows then columns. The matrices reproduce PyTorch's
`interpolate` and Pillow-like antialiasing to rounding, which `jax.image.resize` does not: it has
no `align_corners`, and its cubic always has a = −0.5, PyTorch's only with antialiasing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.types import Array

# What CLIP's processor subtracts from and divides RGB in [0, 1] by; all encoders see such images.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

Method = Literal["bilinear_align_corners", "bilinear_antialias", "bicubic", "bicubic_antialias"]


@jax.named_scope("resize")
def resize(images: Array, *, size: int, method: Method = "bilinear_align_corners") -> Array:
    """Resizes both sides of `images` to `size` in float32; the result has the dtype that came in.

    Shapes:
        images: float[..., H, W, C].
        returns: float[..., size, size, C]; `images` itself where H = W = size.
    """
    height, width = images.shape[-3:-1]
    if height == width == size:
        return images
    rows, columns = _MATRICES[method](height, size), _MATRICES[method](width, size)
    # Full precision: TPUs would otherwise round the pixels to bfloat16, GPUs to TF32.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = product("oh,...hwc->...owc", rows, images.astype(jnp.float32))
    return product("pw,...owc->...opc", columns, x).astype(images.dtype)


def patchify(images: Array, *, patch: int) -> Array:
    """Cuts images into patches, each flattened as (row, column, channel), channel fastest.

    Shapes:
        images: float[I, H, W, C], H and W multiples of `patch`.
        returns: float[I, H / patch, W / patch, patch · patch · C].
    """
    num_images, height, width, channels = images.shape
    rows, columns = height // patch, width // patch
    x = images.reshape(num_images, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(num_images, rows, columns, -1)


@functools.cache
def bilinear_align_corners(size_in: int, size_out: int) -> np.ndarray:
    """float32[out, in]: corner pixels map onto corner pixels; no antialiasing."""
    source = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
    distance = np.abs(source[:, None] - np.arange(size_in)[None])
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


@functools.cache
def bilinear_antialias(size_in: int, size_out: int) -> np.ndarray:
    """float32[out, in]: half-pixel centres, the triangle as wide as the scale, renormalised at
    the edges; when enlarging, plain bilinear."""
    scale = size_in / size_out
    centre = (np.arange(size_out) + 0.5) * scale
    distance = np.abs(np.arange(size_in)[None] + 0.5 - centre[:, None]) / max(scale, 1.0)
    weight = np.maximum(0.0, 1.0 - distance)
    return (weight / weight.sum(-1, keepdims=True)).astype(np.float32)


@functools.cache
def bicubic(size_in: int, size_out: int) -> np.ndarray:
    """float32[out, in]: Keys' cubic with a = −0.75, half-pixel centres, no antialiasing, edge
    pixels repeated outwards."""
    source = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(source).astype(int) - 1
    matrix = np.zeros((size_out, size_in))
    for tap in range(4):
        index = first + tap
        weight = _keys_cubic(np.abs(source - index), a=-0.75)
        np.add.at(matrix, (np.arange(size_out), np.clip(index, 0, size_in - 1)), weight)
    return matrix.astype(np.float32)


@functools.cache
def bicubic_antialias(size_in: int, size_out: int) -> np.ndarray:
    """float32[out, in]: Keys' cubic with a = −0.5, half-pixel centres, as wide as the scale,
    renormalised at the edges."""
    scale = size_in / size_out
    centre = (np.arange(size_out) + 0.5) * scale
    distance = np.abs(np.arange(size_in)[None] + 0.5 - centre[:, None]) / max(scale, 1.0)
    weight = _keys_cubic(distance, a=-0.5)
    return (weight / weight.sum(-1, keepdims=True)).astype(np.float32)


def _keys_cubic(t: np.ndarray, *, a: float) -> np.ndarray:
    """Keys' convolution kernel at distances t ≥ 0."""
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


_MATRICES: dict[str, Callable[[int, int], np.ndarray]] = {
    "bilinear_align_corners": bilinear_align_corners,
    "bilinear_antialias": bilinear_antialias,
    "bicubic": bicubic,
    "bicubic_antialias": bicubic_antialias,
}
