"""The pre-norm transformer block of the encoders, with what differs from one to the other as
options or overridden.

I images, N tokens, E width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from meteor_jax.models.layers.attention import attend
from meteor_jax.models.layers.remat import save_as
from meteor_jax.models.layers.stack import constrain, dense
from meteor_jax.types import Array


class VitBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)). An encoder overrides `make_…`."""

    config: Any
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.norm1 = self.make_norm()
        self.attention = self.make_attention()
        self.norm2 = self.make_norm()
        self.mlp = self.make_mlp()

    def make_norm(self) -> nn.Module:
        raise NotImplementedError

    def make_attention(self) -> nn.Module:
        raise NotImplementedError

    def make_mlp(self) -> nn.Module:
        raise NotImplementedError

    def __call__(self, x: Array, *aux: Any) -> tuple[Array, None]:
        """float[I, N, E] → float[I, N, E]; `aux` goes to the attention."""
        return constrain(self.feed_forward(self.attend(x, *aux)), "btd"), None

    def attend(self, x: Array, *aux: Any) -> Array:
        """The first half of the block."""
        return save_as("residual", x + self.attention(self.norm1(x), *aux))

    def feed_forward(self, x: Array) -> Array:
        """The second half."""
        return x + self.mlp(self.norm2(x))

    def query_key(self, x: Array, *aux: Any) -> tuple[Array, Array]:
        """Queries and keys of the block's attention, from the block's input."""
        return self.attention.query_key(self.norm1(x), *aux)


class SelfAttention(nn.Module):
    """Self-attention over all tokens.

    Attributes:
        scale: of the products, default d**-0.5.
        query_init: of the query's kernel, where it is not the usual one.
    """

    width: int
    num_heads: int
    use_bias: bool = True
    key_bias: bool = True
    scale: float | None = None
    query_init: Any = None
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = {} if self.query_init is None else {"kernel_init": self.query_init}
        options = {"dtype": self.dtype, "use_bias": self.use_bias}
        self.query = dense(self.width, **options, **init)
        self.key = dense(self.width, dtype=self.dtype, use_bias=self.use_bias and self.key_bias)
        self.value = dense(self.width, **options)
        self.out = dense(self.width, **options)

    def __call__(self, x: Array, *aux: Any) -> Array:
        q, k = self.query_key(x, *aux)
        mixed = attend(q, k, self.heads(self.value(x)), scale=self.scale)
        return self.out(mixed.reshape(x.shape))

    def query_key(self, x: Array, *aux: Any) -> tuple[Array, Array]:
        """Queries and keys before the scale, float[I, N, H, d] each."""
        del aux  # of subclasses
        return self.heads(self.query(x)), self.heads(self.key(x))

    def heads(self, x: Array) -> Array:
        """float[..., E] → float[..., H, d]."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1)


class Mlp(nn.Module):
    """Two layers with an activation between them."""

    width: int
    hidden: int
    activation: Callable[[Array], Array]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = save_as("mlp", dense(self.hidden, dtype=self.dtype, name="fc1")(x))
        return dense(self.width, dtype=self.dtype, name="fc2")(self.activation(x))


class GatedMlp(nn.Module):
    """out(norm(gated(gate(x), up(x)))).

    Attributes:
        gated: (gate, up) → their product, the gate activated.
        norm: makes the norm, where there is one.
    """

    width: int
    hidden: int
    gated: Callable[[Array, Array], Array]
    use_bias: bool = True
    norm: Callable[..., nn.Module] | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        options = {"dtype": self.dtype, "use_bias": self.use_bias}
        gate = save_as("mlp", dense(self.hidden, **options, name="gate")(x))
        up = save_as("mlp", dense(self.hidden, **options, name="up")(x))
        x = self.gated(gate, up)
        if self.norm is not None:
            x = self.norm(self.dtype, name="norm")(x)
        return dense(self.width, **options, name="out")(x)


def layer_norm(dtype: Any, *, epsilon: float, name: str | None = None) -> nn.LayerNorm:
    """A layer norm whose variance is that of the centred values."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)
