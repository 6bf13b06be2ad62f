"""Pixels as encoders take them, and a hash that tells images apart. I images, H W pixels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from meteor_jax.models.layers.resize import IMAGE_MEAN, IMAGE_STD
from meteor_jax.types import Array


def normalise(images: Array, *, size: int, dtype: str) -> Array:
    """uint8[I, H, W, 3] with CLIP's mean and deviation taken out; images of a float dtype are taken
    as they are.

    Raises:
        ValueError: for images of another size than `size`.
    """
    if images.shape[1:] != (size, size, 3):
        raise ValueError(
            f"expected images of {size}×{size}×3, got {'×'.join(map(str, images.shape[1:]))}; "
            "set model.image_size or resize the data."
        )
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images.astype(dtype)
    pixels = (images / jnp.float32(255) - jnp.asarray(IMAGE_MEAN)) / jnp.asarray(IMAGE_STD)
    return pixels.astype(dtype)


def hash_images(images: Array) -> Array:
    """uint32[I]: a hash of the pixels, exact, so the same on every device and in every batch."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        images = jax.lax.bitcast_convert_type(images.astype(jnp.float32), jnp.uint32)
    flat = images.reshape(images.shape[0], -1).astype(jnp.uint32)
    weight = jnp.arange(flat.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
    return (flat * weight).sum(1, dtype=jnp.uint32)
