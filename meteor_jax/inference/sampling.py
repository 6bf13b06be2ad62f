"""How the next token is chosen from logits.

B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from meteor_jax.types import Array


@dataclasses.dataclass(frozen=True, order=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: only the most likely tokens that together hold this much probability are drawn.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling: expected temperature ≥ 0 and 0 < top_p ≤ 1, got {self.temperature} "
                f"and {self.top_p}."
            )


GREEDY = Sampling()


def draw(logits: Array, *, sampling: Sampling, keys: Array) -> Array:
    """int32[B]: one token a row of float32[B, V] logits; `keys` has a PRNG key for each row."""
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token stays if those before it hold less than top_p, so the first always does.
        inside = jnp.cumsum(probability, axis=-1) - probability < sampling.top_p
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_keys(seeds: Array) -> Array:
    """A PRNG key for each of uint32[B] seeds."""
    return jax.vmap(jax.random.key)(seeds)


def is_finite(logits: Array) -> Array:
    """bool[...]: no logit of float32[..., V] is NaN or +inf, nor are all −inf, each of which is a
    token that cannot come."""
    broken = jnp.isnan(logits) | jnp.isposinf(logits)
    return ~broken.any(-1) & jnp.isfinite(logits).any(-1)
