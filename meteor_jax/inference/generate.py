"""Answers, token by token, in two compiled programs: prefill, then a loop until all rows end.

Between the two the host looks at how many tokens the rows kept, and picks one of a few static
lengths of cache, so that decoding reads no more than it must.

B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from meteor_jax.models.eagle.model import Meteor
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, DecodeCache, PruneStepTrace, VisualTokens


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
    """The answers, and what stage 3 did.

    Shapes:
        tokens: int32[B, max_new_tokens], the end token after a row's end.
        num_tokens: int32[B], without the end token.
        finite: bool[B]; False where a row had a logit that is NaN or +inf, so that its tokens
            mean nothing.
    """

    tokens: Array
    num_tokens: Array
    finite: Array
    prune_steps: tuple[PruneStepTrace, ...]


@flax.struct.dataclass
class Started:
    """Rows after their first token.

    Shapes:
        first: int32[B]; finite: bool[B].
        longest: int32[segments]; prompt entries in the fullest row of each segment's cache.
    """

    first: Array
    finite: Array
    longest: Array
    cache: DecodeCache
    prune_steps: tuple[PruneStepTrace, ...]


@flax.struct.dataclass
class _State:
    step: Array
    tokens: Array
    done: Array
    finite: Array
    cache: DecodeCache


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
    """Answers every prompt. Where the budget of stage 3 is adaptive it waits for the prefill.

    Shapes:
        visual: VisualTokens of [B, M, N, D], from `Meteor.encode_images`; image_valid: bool[B, M].
        tokens: int32[B, T], prompts padded on the right; text_valid: bool[B, T].
        key: a PRNG key, needed where `sampling.temperature` is above 0.
    """
    if key is None:
        if sampling.temperature > 0:
            raise ValueError("sampling with a temperature needs key=jax.random.key(seed).")
        key = jax.random.key(0)
    started = start(
        model,
        params,
        visual,
        image_valid=image_valid,
        tokens=tokens,
        text_valid=text_valid,
        plan=plan,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        key=key,
    )
    return decode(
        model,
        params,
        started,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        sampling=sampling,
        key=key,
        cache_length=choose_cache_length(started),
    )


# Unused parameters are arguments too, so that `memory_analysis` counts what a device holds.
@functools.partial(
    jax.jit, static_argnames=("model", "plan", "max_new_tokens", "sampling"), keep_unused=True
)
def start(
    model: Meteor,
    params: Any,
    visual: VisualTokens,
    *,
    image_valid: Array,
    tokens: Array,
    text_valid: Array,
    plan: PrunePlan,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    key: Array,
) -> Started:
    """Reads the prompts and draws the first token of every answer; see `generate`."""
    prefilled = model.apply(
        {"params": params},
        visual,
        image_valid=image_valid,
        tokens=tokens,
        text_valid=text_valid,
        plan=plan,
        max_new_tokens=max_new_tokens,
        method="prefill",
    )
    longest = jnp.stack([layers.valid.sum(1).max() for layers in prefilled.cache.ranges])
    return Started(
        first=draw(prefilled.logits, sampling=sampling, key=jax.random.fold_in(key, 0)),
        finite=is_sound(prefilled.logits),
        longest=_on_every_host(longest),
        cache=prefilled.cache,
        prune_steps=prefilled.prune_steps,
    )


def choose_cache_length(started: Started) -> int:
    """The first choice of `DecodeCache.trim` that holds every row; waits only if there is one."""
    choices = started.cache.num_lengths
    if choices == 1:
        return 0
    longest = np.asarray(jax.device_get(started.longest))
    for choice in range(choices - 1):
        lengths = [s.lengths[min(choice, len(s.lengths) - 1)] for s in started.cache.ranges]
        if (longest <= lengths).all():
            return choice
    return choices - 1


def decode(
    model: Meteor,
    params: Any,
    started: Started,
    *,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = Sampling(),
    key: Array,
    cache_length: int = 0,
) -> Generated:
    """Goes on from the first token until every row has ended, or has `max_new_tokens`. The cache of
    `started` is given away.

    Args:
        cache_length: of `choose_cache_length`.
    """
    cache = trim(started.cache, cache_length)
    rows, _ = decode_rows(
        model,
        params,
        started.first,
        started.finite,
        cache,
        key,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        sampling=sampling,
    )
    return Generated(
        tokens=rows.tokens,
        num_tokens=(rows.tokens != eos_id).sum(1).astype(jnp.int32),
        finite=rows.finite,
        prune_steps=started.prune_steps,
    )


@flax.struct.dataclass
class Decoded:
    """int32[B, max_new_tokens] and bool[B], as in `Generated`."""

    tokens: Array
    finite: Array


@functools.partial(
    jax.jit,
    static_argnames=("model", "max_new_tokens", "eos_id", "sampling"),
    donate_argnames=("cache",),
    keep_unused=True,
)
def decode_rows(
    model: Meteor,
    params: Any,
    first: Array,
    finite: Array,
    cache: DecodeCache,
    key: Array,
    *,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = Sampling(),
) -> tuple[Decoded, DecodeCache]:
    """The program of `decode`: rows that have ended, and the cache, which takes the place of the
    one that was given."""
    out = jnp.full((first.shape[0], max_new_tokens), eos_id, jnp.int32)
    state = _State(
        step=jnp.ones((), jnp.int32),
        tokens=out.at[:, 0].set(first),
        done=first == eos_id,
        finite=finite,
        cache=cache,
    )

    def unfinished(state: _State) -> Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def step(state: _State) -> _State:
        previous = jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)
        extended = model.apply({"params": params}, state.cache, previous, method="extend")
        logits = extended.logits[:, 0]
        drawn = draw(logits, sampling=sampling, key=jax.random.fold_in(key, state.step))
        drawn = jnp.where(state.done, eos_id, drawn)
        return _State(
            step=state.step + 1,
            tokens=jax.lax.dynamic_update_slice(state.tokens, drawn[:, None], (0, state.step)),
            done=state.done | (drawn == eos_id),
            finite=state.finite & (state.done | is_sound(logits)),
            cache=extended.cache,
        )

    state = jax.lax.while_loop(unfinished, step, state)
    return Decoded(tokens=state.tokens, finite=state.finite), state.cache


def trim(cache: DecodeCache, choice: int) -> DecodeCache:
    """`DecodeCache.trim`, compiled; the same cache where nothing is to be trimmed."""
    return cache if choice >= cache.num_lengths - 1 else _trim(cache, choice)


@jax.jit(static_argnames=("choice",))
def _trim(cache: DecodeCache, choice: int) -> DecodeCache:
    return cache.trim(choice)


def is_sound(logits: Array) -> Array:
    """bool[...]: no logit of float32[..., V] is NaN or +inf, nor are all −inf, each of which is a
    token that cannot come."""
    broken = jnp.isnan(logits) | jnp.isposinf(logits)
    return ~broken.any(-1) & jnp.isfinite(logits).any(-1)


def _on_every_host(x: Array) -> Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


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
