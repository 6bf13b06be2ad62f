"""Answers, token by token, in one compiled program: prefill, then a loop until all rows end.

B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from meteor_jax.models.meteor import Meteor
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, CutTrace, DecodeCache, VisualTokens


@dataclasses.dataclass(frozen=True)
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


@flax.struct.dataclass
class Generated:
    """`tokens` int32[B, max_new_tokens] (the end token after a row's end), `num_tokens` int32[B]
    without the end token, and what stage 3 did."""

    tokens: Array
    num_tokens: Array
    cuts: tuple[CutTrace, ...]


@flax.struct.dataclass
class _State:
    step: Array
    tokens: Array
    done: Array
    cache: DecodeCache
    key: Array


@functools.partial(
    jax.jit, static_argnames=("model", "plan", "max_new_tokens", "eos_id", "sampling")
)
def generate(
    model: Meteor,
    params: Any,
    visual: VisualTokens,
    *,
    image_valid: Array,
    tokens: Array,
    text_valid: Array,
    plan: PrunePlan,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
) -> Generated:
    """Answers every prompt.

    Shapes:
        visual: VisualTokens of [B, M, N, D], from `Meteor.encode_images`; image_valid: bool[B, M].
        tokens: int32[B, T], prompts padded on the right; text_valid: bool[B, T].
        key: a PRNG key, needed where `sampling.temperature` is above 0.
    """
    variables = {"params": params}
    prefilled = model.apply(
        variables, visual, image_valid=image_valid, tokens=tokens, text_valid=text_valid,
        plan=plan, max_new_tokens=max_new_tokens, method="prefill",
    )
    if key is None:
        if sampling.temperature > 0:
            raise ValueError("sampling with a temperature needs key=jax.random.key(seed).")
        key = jax.random.key(0)
    first_key, key = jax.random.split(key)
    first = draw(prefilled.logits, sampling=sampling, key=first_key)
    out = jnp.full((tokens.shape[0], max_new_tokens), eos_id, jnp.int32)
    state = _State(
        step=jnp.ones((), jnp.int32),
        tokens=out.at[:, 0].set(first),
        done=first == eos_id,
        cache=prefilled.cache,
        key=key,
    )

    def unfinished(state: _State) -> Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def step(state: _State) -> _State:
        previous = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        extended = model.apply(variables, state.cache, previous, method="extend")
        step_key, key = jax.random.split(state.key)
        drawn = draw(extended.logits[:, 0], sampling=sampling, key=step_key)
        drawn = jnp.where(state.done, eos_id, drawn)
        return _State(
            step=state.step + 1,
            tokens=jax.lax.dynamic_update_slice(state.tokens, drawn[:, None], (0, state.step)),
            done=state.done | (drawn == eos_id),
            cache=extended.cache,
            key=key,
        )

    state = jax.lax.while_loop(unfinished, step, state)
    return Generated(
        tokens=state.tokens,
        num_tokens=(state.tokens != eos_id).sum(1).astype(jnp.int32),
        cuts=prefilled.cuts,
    )


def draw(logits: Array, *, sampling: Sampling, key: Array) -> Array:
    """int32[B]: one token a row of float32[B, V] logits. Rows do not influence one another."""
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
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
