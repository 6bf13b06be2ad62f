"""The projector: encoder features into the LLM's width."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from meteor_jax.models.layers import dense
from meteor_jax.types import Array


class Projector(nn.Module):
    """Linear, exact GELU, Linear: "mlp2x_gelu" of LLaVA and EAGLE."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """float[..., E] → float[..., width]."""
        hidden = nn.gelu(dense(self.width, dtype=self.dtype, name="fc1")(x), approximate=False)
        return dense(self.width, dtype=self.dtype, name="fc2")(hidden)
