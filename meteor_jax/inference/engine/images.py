"""Images in whatever form a caller has them, as handles that are read when they are needed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from meteor_jax.config import ConfigError
from meteor_jax.data.sources.registry import CorruptImage, decode_image, square_image


@dataclasses.dataclass(frozen=True)
class ImageHandle:
    """An image that is read later, in another thread.

    Attributes:
        key: images of equal keys are one image.
        read: encoded bytes, a path, a PIL image or uint8[H, W, 3].
    """

    key: Hashable
    read: Callable[[], Any] = dataclasses.field(compare=False)


def image_handle(image: Any) -> ImageHandle:
    """A handle whose key stands for the content, or for the path of a file.

    Raises:
        TypeError: for what is no image.
        ConfigError: for a path where no file is.
    """
    if isinstance(image, ImageHandle):
        return image
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise ConfigError(f"image: no file '{image}'.")
        return ImageHandle(str(image), lambda: image)
    if isinstance(image, bytes):
        content: Any = image
    elif isinstance(image, Image.Image):
        content = np.asarray(image.convert("RGB"))
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        content = np.ascontiguousarray(image)
    else:
        raise TypeError(
            "image: expected bytes, a path, a PIL image, uint8[H, W, 3] or an ImageHandle, got "
            f"{type(image).__name__}."
        )
    shape = getattr(content, "shape", ())
    key = hashlib.sha256(repr(shape).encode())
    key.update(content if isinstance(content, bytes) else content.data)
    return ImageHandle(key.hexdigest(), lambda: image)


def read_pixels(image: ImageHandle, *, size: int) -> np.ndarray | None:
    """uint8[size, size, 3] as models take it; None where the image cannot be decoded."""
    found = image.read()
    if isinstance(found, str | Path):
        found = Path(found).read_bytes()
    if isinstance(found, bytes):
        try:
            return decode_image(found, size=size)
        except CorruptImage:
            return None
    if isinstance(found, np.ndarray):
        found = Image.fromarray(found)
    return square_image(found.convert("RGB"), size=size)
