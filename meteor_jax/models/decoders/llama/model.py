"""The decoder: LLaMA with stacked layers, run range by range.

B rows, S entries of the packed sequence, T new tokens, H heads, K kv heads, D width, d head width,
L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.models.layers.attention import attend, attend_cached, attention_received
from meteor_jax.models.layers.ragged import RaggedLayout
from meteor_jax.models.layers.remat import save_as
from meteor_jax.models.layers.stack import Stack, constrain, dense, gated_silu
from meteor_jax.types import Array, RangeCache


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a LLaMA; the defaults are Vicuna-7B v1.5's.

    Attributes:
        max_positions: rotary positions that there are; a longer sequence is an error.
        pad_vocab_to_multiple_of: embedding and head get so many more columns, which stand for no
            token, that `tensor` can divide them. They take part in nothing, and conversion and
            export leave them out.
        init_std: of the normal distribution that every matrix starts from.
        remat: see `Stack`.
    """

    depth: int = 32
    width: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 32
    mlp_dim: int = 11008
    vocab_size: int = 32000
    pad_vocab_to_multiple_of: int = 1
    max_positions: int = 4096
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.width % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"llama: num_heads={self.num_heads} must divide width={self.width} and be a "
                f"multiple of num_kv_heads={self.num_kv_heads}."
            )
        if self.pad_vocab_to_multiple_of < 1:
            raise ValueError(
                "llama.pad_vocab_to_multiple_of: expected at least 1, got "
                f"{self.pad_vocab_to_multiple_of}; 128 suits any mesh."
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_columns(self) -> int:
        """Rows of the embedding, columns of the head and of logits: the vocabulary, padded."""
        multiple = self.pad_vocab_to_multiple_of
        return -(-self.vocab_size // multiple) * multiple

    @property
    def unpadded_shapes(self) -> dict[str, tuple[int, ...]]:
        """By path in the whole model, the parameters that are padded, with their shapes without."""
        if self.num_columns == self.vocab_size:
            return {}
        return {
            "llama/embedding/embedding": (self.vocab_size, self.width),
            "llama/head/kernel": (self.width, self.vocab_size),
        }


def rope_freqs(position: Array, *, config: LlamaConfig) -> tuple[Array, Array]:
    """Cosines and sines, float32[B, S, 1, d/2], of int32[B, S] positions.

    They are looked up, not computed: XLA would otherwise fuse the sines into every layer, forwards
    and backwards, and compute them each time.
    """
    cos, sin = _rotary_constants(config.max_positions, config.head_dim, config.rope_theta)
    return jnp.asarray(cos)[position][..., None, :], jnp.asarray(sin)[position][..., None, :]


@functools.cache
def _rotary_constants(
    max_positions: int, head_dim: int, theta: float
) -> tuple[np.ndarray, np.ndarray]:
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(max_positions)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: Array, freqs: tuple[Array, Array]) -> Array:
    """LLaMA's half-split rotation of float[B, S, heads, d], computed in float32."""
    cos, sin = freqs
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class LlamaBlock(nn.Module):
    """One layer: pre-norm attention and SwiGLU. Returns (x, (k, v)) with the keys rotated."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        config = self.config

        def linear(features: int) -> nn.Dense:
            init = nn.initializers.normal(config.init_std)
            return dense(features, dtype=self.dtype, use_bias=False, kernel_init=init)

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=config.norm_eps, dtype=self.dtype)

        self.attention_norm = norm()
        self.query = linear(config.width)
        self.key = linear(config.num_kv_heads * config.head_dim)
        self.value = linear(config.num_kv_heads * config.head_dim)
        self.out = linear(config.width)
        self.mlp_norm = norm()
        self.gate = linear(config.mlp_dim)
        self.up = linear(config.mlp_dim)
        self.down = linear(config.width)

    def __call__(
        self,
        x: Array,
        freqs: tuple[Array, Array],
        mask: Array | None = None,
        layout: RaggedLayout | None = None,
        cache: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Without `cache` (k, v, valid), x is a whole packed sequence and attends to itself, where
        `mask` (bool[B, S, S]) lets it; with it, x are new entries that also see what is cached.
        With `layout`, x (and the freqs) are buffers [G, F, …] of rows that attend each to itself;
        the keys and values that are returned are rows [B, L, …]."""
        hidden = self.attention_norm(x)
        q, k = self._query_key(hidden, freqs)
        v = constrain(self._heads(self.value(hidden)), "bthd")
        if layout is not None:  # one gather each: XLA's CPU backend is slow to gather what it joins
            q, k, v = (constrain(layout.to_rows(array), "bthd") for array in (q, k, v))
        if cache:
            attended = attend_cached(q, k, v, cache)
        else:
            attended = attend(q, k, v, causal=True, mask=mask)
        if layout is not None:
            attended = constrain(layout.to_buffers(attended), "bthd")
        x = save_as("residual", x + self.out(attended.reshape(*x.shape[:2], -1)))
        hidden = self.mlp_norm(x)
        gate, up = save_as("mlp", self.gate(hidden)), save_as("mlp", self.up(hidden))
        hidden = constrain(gated_silu(gate, up), "btf")
        return constrain(x + self.down(hidden), "btd"), (k, v)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    def _query_key(self, hidden: Array, freqs: tuple[Array, Array] | None) -> tuple[Array, Array]:
        return self._query(hidden, freqs), self._key(hidden, freqs)

    def _query(self, hidden: Array, freqs: tuple[Array, Array] | None) -> Array:
        q = self._heads(self.query(hidden))
        return constrain(q if freqs is None else rotate(q, freqs), "bthd")

    def _key(self, hidden: Array, freqs: tuple[Array, Array] | None) -> Array:
        k = self._heads(self.key(hidden))
        return constrain(k if freqs is None else rotate(k, freqs), "bthd")

    def keys(self, x: Array, freqs: tuple[Array, Array] | None) -> Array:
        """float[B, S, K, d] of the layer's input float[B, S, D]; unrotated without `freqs`."""
        return self._key(self.attention_norm(x), freqs)

    def text_attention(
        self,
        x: Array,
        freqs: tuple[Array, Array] | None,
        keys: Array,
        row_weight: Array,
        rows: Array,
    ) -> Array:
        """float32[B, H, S]: attention of some entries to all, as this layer computes it.

        Shapes:
            x: float[B, R, D], the layer's input at these entries, and their freqs; None leaves
                the rotation out.
            keys: float[B, S, K, d] of all entries, rotated if the queries are.
            rows: int32[B, R], the entries' places; row_weight: float[B, R].
        """
        q = self._query(self.attention_norm(x), freqs)
        sees = rows[..., None] >= jnp.arange(keys.shape[1])
        return attention_received(q, keys, row_weight=row_weight, mask=sees)


@jax.custom_jvp
def _float32_product(x: Array, kernel: Array) -> Array:
    """float32[..., V], summed up in float32 whatever the factors are. Its gradient is computed in
    the factors' dtype, as that of every other layer."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


@_float32_product.defjvp
def _float32_product_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    tangent = jnp.matmul(dx, kernel) + jnp.matmul(x, dkernel)
    return _float32_product(x, kernel), tangent.astype(jnp.float32)


class Llama(nn.Module):
    """Embedding, stacked layers, final norm and head; the caller decides where ranges end."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    if TYPE_CHECKING:  # Flax declares a pair too, which comes with `mutable` only

        def apply(self, *args: Any, **options: Any) -> Any: ...

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.init_std)
        self.embedding = nn.Embed(
            config.num_columns, config.width, dtype=self.dtype, embedding_init=init
        )
        self.blocks = Stack(LlamaBlock, config, config.depth, self.dtype, config.remat)
        self.norm = nn.RMSNorm(epsilon=config.norm_eps, dtype=self.dtype)
        if not config.tie_embeddings:
            self.head = nn.Dense(
                config.num_columns,
                dtype=self.dtype,
                use_bias=False,
                kernel_init=init,
                dot_general=lambda x, kernel, *_, **__: _float32_product(x, kernel),
            )

    def embed(self, tokens: Array) -> Array:
        """float[B, T, D] of int32[B, T] token ids."""
        # First as the table lies, then by rows: no device gathers the table, and the SPMD
        # partitioner does not replicate the rows on the way.
        return constrain(constrain(self.embedding(tokens), "btd by width"), "btd")

    def logits(self, x: Array) -> Array:
        """float32[..., V] of the residual stream; V is `num_columns`, and the logit of a column
        that stands for no token is the lowest number there is."""
        x = self.norm(x)
        if self.config.tie_embeddings:
            logits = _float32_product(x, self.embedding.embedding.astype(self.dtype).T)
        else:
            logits = self.head(x)
        if self.config.num_columns == self.config.vocab_size:
            return logits
        is_token = jnp.arange(self.config.num_columns) < self.config.vocab_size
        return jnp.where(is_token, logits, jnp.finfo(jnp.float32).min)

    def run(
        self,
        x: Array,
        position: Array | tuple[Array, Array],
        *,
        start: int,
        stop: int,
        segment_ids: Array | None = None,
        layout: RaggedLayout | None = None,
    ) -> Any:
        """Layers `[start, stop)` over packed sequences: `StackOutput`, its extras the layers'
        (k, v), each [L, B, S, K, d].

        Args:
            position: int32[B, S], or the `rope_freqs` of them.
            layout: x float[G, F, D] and position int32[G, F] are buffers of it; (k, v) are rows.
        """
        freqs = position
        if not isinstance(position, tuple):
            freqs = rope_freqs(position, config=self.config)
        mask = None
        if segment_ids is not None:
            of_keys = segment_ids[:, None, :]
            mask = (of_keys == 0) | (of_keys == segment_ids[:, :, None])
        return self.blocks(x, freqs, mask, layout, start=start, stop=stop)

    def run_cached(
        self, x: Array, position: Array, cache: RangeCache, *, start: int, stop: int
    ) -> Any:
        """Layers `[start, stop)` over new entries float[B, T, D] that also see `cache`."""
        freqs = rope_freqs(position, config=self.config)
        valid = jnp.broadcast_to(cache.valid, (stop - start, *cache.valid.shape))
        per_layer = ((cache.k, cache.v, valid),)
        return self.blocks(x, freqs, None, None, start=start, stop=stop, per_layer=per_layer)

    def keys(self, x: Array, position: Array, *, layer: int, rotary: str) -> Array:
        """`LlamaBlock.keys` of one layer."""
        return self.blocks.layer(layer, x, self._freqs(position, rotary), method="keys")

    def text_attention(
        self,
        x: Array,
        position: Array,
        keys: Array,
        *,
        layer: int,
        row_weight: Array,
        rows: Array,
        rotary: str,
    ) -> Array:
        """`LlamaBlock.text_attention` of one layer; `rotary` is a plan's "with" or "without"."""
        freqs = self._freqs(position, rotary)
        return self.blocks.layer(layer, x, freqs, keys, row_weight, rows, method="text_attention")

    def _freqs(self, position: Array, rotary: str) -> tuple[Array, Array] | None:
        return rope_freqs(position, config=self.config) if rotary == "with" else None
