"""The projector: encoder features into the LLM's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from meteor_jax.models.layers.stack import dense
from meteor_jax.types import Array


class Projector(nn.Module):
    """Linear, exact GELU, Linear: "mlp2x_gelu" of LLaVA and EAGLE."""

    width: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.fc1 = dense(self.width, dtype=self.dtype)
        self.fc2 = dense(self.width, dtype=self.dtype)

    def __call__(self, x: Array) -> Array:
        """float[..., E] → float[..., width]."""
        return self.fc2(nn.gelu(self.fc1(x), approximate=False))

    def parts(self, features: Sequence[Array]) -> list[Array]:
        """What each encoder's channels contribute to the first layer, before bias and GELU.

        Shapes:
            features: float[..., E_l] an encoder, in the order in which they are joined.
            returns: float[..., width] an encoder; with the bias they sum to the first layer.
        """
        kernel = self.fc1.variables["params"]["kernel"].astype(self.dtype)
        ends = np.cumsum([x.shape[-1] for x in features])
        return [
            x.astype(self.dtype) @ kernel[end - x.shape[-1] : end]
            for x, end in zip(features, ends, strict=True)
        ]
