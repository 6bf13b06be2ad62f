"""Text from a model under one plan: one program reads the prompts, another adds tokens.

`start` gives every row its first token. The host then looks at how many visual tokens the rows
kept and picks one of a few static lengths of cache, so that decoding reads no more than it must.
`step` goes on up to any number of tokens: to the end in one call, or one token at a time.

S shards of the mesh, I images of a shard in one batch, B rows, T prompt tokens, M images of a
prompt, N visual tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.inference.engine.data_shards import DataShards
from meteor_jax.inference.engine.predictor import PromptBatch, encode_images, fused_shape
from meteor_jax.inference.engine.request import ShapeBucket
from meteor_jax.inference.engine.streaming import find_stop
from meteor_jax.inference.sampling import GREEDY, Sampling, draw, is_finite, row_keys
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array, DecodeCache, PruneStepTrace, VisualTokens

STOP_INTERVAL = 16  # tokens after which the host looks for stop texts


class Generation(flax.struct.PyTreeNode):
    """What a batch of prompts was answered with, on the device.

    Shapes:
        tokens: int32[B, max_new_tokens], the end token after a row's end.
        num_tokens: int32[B], without the end token.
        finite: bool[B]; False where a row had a logit that is NaN or +inf, so that its tokens
            mean nothing.
        prune_steps: what pruning inside the decoder kept.
    """

    tokens: Array
    num_tokens: Array
    finite: Array
    prune_steps: tuple[PruneStepTrace, ...]


class DecodeState(flax.struct.PyTreeNode):
    """Rows on their way.

    Shapes:
        tokens: int32[B, max_new_tokens], the end token where none has been drawn yet.
        count: int32[]; tokens that every row has, ended rows included.
        done: bool[B]; the row has ended. finite: bool[B], as in `Generation`.
        seeds: uint32[B].
    """

    tokens: Array
    count: Array
    done: Array
    finite: Array
    seeds: Array
    cache: DecodeCache


class Started(flax.struct.PyTreeNode):
    """Rows after their first token.

    Shapes:
        longest: int32[ranges]; prompt entries in the fullest row of each range's cache.
    """

    state: DecodeState
    longest: Array
    prune_steps: tuple[PruneStepTrace, ...]


def generate(
    model: Any,
    params: Any,
    visual: VisualTokens,
    *,
    image_valid: Array,
    tokens: Array,
    text_valid: Array,
    plan: PrunePlan,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
) -> Generation:
    """Answers every prompt. Where the budget of stage 3 is adaptive it waits for the prefill.

    Shapes:
        visual: VisualTokens of [B, M, N, D], from `Meteor.encode_images`; image_valid: bool[B, M].
        tokens: int32[B, T], prompts padded on the right; text_valid: bool[B, T].
        key: a PRNG key, needed where `sampling.temperature` is above 0.

    Raises:
        ValueError: if a key is needed and there is none.
    """
    if key is None:
        if sampling.temperature > 0:
            raise ValueError("sampling with a temperature needs key=jax.random.key(seed).")
        key = jax.random.key(0)
    started = start(
        model,
        params,
        visual,
        PromptBatch(tokens, text_valid, image_valid, jax.random.bits(key, (len(tokens),))),
        plan=plan,
        max_new_tokens=max_new_tokens,
        eos_id=eos_id,
        sampling=sampling,
    )
    state = trim(started.state, choose_cache_length(started))
    state = step(model, params, state, max_new_tokens, eos_id=eos_id, sampling=sampling)
    return finish(state, started.prune_steps, eos_id=eos_id)


# Unused parameters are arguments too, so that `memory_analysis` counts what a device holds.
@functools.partial(
    jax.jit,
    static_argnames=("model", "plan", "max_new_tokens", "sampling"),
    keep_unused=True,
)
def start(
    model: Any,
    params: Any,
    visual: VisualTokens,
    prompts: PromptBatch,
    *,
    plan: PrunePlan,
    max_new_tokens: int,
    eos_id: int,
    sampling: Sampling = GREEDY,
) -> Started:
    """Reads the prompts and draws the first token of every row; see `generate`."""
    prefilled = model.apply(
        {"params": params},
        visual,
        image_valid=prompts.image_valid,
        tokens=prompts.tokens,
        text_valid=prompts.text_valid,
        plan=plan,
        max_new_tokens=max_new_tokens,
        method="prefill",
    )
    first = draw(prefilled.logits, sampling=sampling, keys=_keys(prompts.seeds, 0))
    tokens = jnp.full((first.shape[0], max_new_tokens), eos_id, jnp.int32).at[:, 0].set(first)
    state = DecodeState(
        tokens=tokens,
        count=jnp.ones((), jnp.int32),
        done=first == eos_id,
        finite=is_finite(prefilled.logits),
        seeds=prompts.seeds,
        cache=prefilled.cache,
    )
    longest = jnp.stack([layers.valid.sum(1).max() for layers in prefilled.cache.ranges])
    return Started(state=state, longest=_on_every_host(longest), prune_steps=prefilled.prune_steps)


@functools.partial(
    jax.jit,
    static_argnames=("model", "sampling"),
    donate_argnames=("state",),
    keep_unused=True,
)
def step(
    model: Any,
    params: Any,
    state: DecodeState,
    limit: Array | int,
    ended: Array | np.ndarray | None = None,
    *,
    eos_id: int,
    sampling: Sampling = GREEDY,
) -> DecodeState:
    """Adds tokens until every row has ended or has `limit` of them. `state` is given away.

    One program serves any `limit` up to `max_new_tokens`, so streaming token by token gives the
    tokens of a single call.

    Args:
        ended: bool[B]; rows that the caller ends here, as for a stop text.
    """
    if ended is not None:
        state = state.replace(done=state.done | ended)

    def unfinished(state: DecodeState) -> Array:
        return (state.count < limit) & ~state.done.all()

    def one(state: DecodeState) -> DecodeState:
        previous = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
        extended = model.apply({"params": params}, state.cache, previous, method="extend")
        logits = extended.logits[:, 0]
        drawn = draw(logits, sampling=sampling, keys=_keys(state.seeds, state.count))
        drawn = jnp.where(state.done, eos_id, drawn)
        return state.replace(
            tokens=jax.lax.dynamic_update_slice(state.tokens, drawn[:, None], (0, state.count)),
            count=state.count + 1,
            done=state.done | (drawn == eos_id),
            finite=state.finite & (state.done | is_finite(logits)),
            cache=extended.cache,
        )

    return jax.lax.while_loop(unfinished, one, state)


def finish(
    state: DecodeState, prune_steps: tuple[PruneStepTrace, ...], *, eos_id: int
) -> Generation:
    """What the rows have so far."""
    return Generation(
        tokens=state.tokens,
        num_tokens=(state.tokens != eos_id).sum(1).astype(jnp.int32),
        finite=state.finite,
        prune_steps=prune_steps,
    )


def choose_cache_length(started: Started) -> int:
    """The first choice of `DecodeCache.trim` that holds every row; waits only if there is one."""
    cache = started.state.cache
    choices = cache.num_lengths
    if choices == 1:
        return 0
    longest = np.asarray(jax.device_get(started.longest))
    for choice in range(choices - 1):
        lengths = [s.lengths[min(choice, len(s.lengths) - 1)] for s in cache.ranges]
        if (longest <= lengths).all():
            return choice
    return choices - 1


def trim(state: DecodeState, choice: int) -> DecodeState:
    """`DecodeCache.trim`, compiled; the same state where nothing is to be trimmed."""
    if choice >= state.cache.num_lengths - 1:
        return state
    return state.replace(cache=_trim(state.cache, choice))


@jax.jit(static_argnames=("choice",))
def _trim(cache: DecodeCache, choice: int) -> DecodeCache:
    return cache.trim(choice)


def _keys(seeds: Array, count: Array | int) -> Array:
    """The rows' PRNG keys for their token number `count`."""
    return jax.vmap(lambda key: jax.random.fold_in(key, count))(row_keys(seeds))


def _on_every_host(x: Array) -> Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class TextPredictor:
    """A model that answers in text, under one plan; see `Predictor`."""

    model: Any
    params: Any = dataclasses.field(repr=False)
    plan: PrunePlan
    tokenizer: Tokenizer
    eos_id: int
    shards: DataShards = DataShards()

    @property
    def image_size(self) -> int:
        return self.model.config.image_size

    def encode(self, images: Array) -> VisualTokens:
        return encode_images(self.params, images, model=self.model, plan=self.plan)

    def encode_nothing(self, images: Array) -> VisualTokens:
        """One visual token an image, which is never read; what the plan needs where it prunes."""
        if self.plan.prunes:
            return self.encode(images)
        shape = fused_shape(self.model, self.params, plan=self.plan)
        return jax.tree.map(
            lambda leaf: jnp.zeros((*images.shape[:2], 1, *leaf.shape[2:]), leaf.dtype), shape
        )

    def predict(
        self, visual: VisualTokens, prompts: PromptBatch, *, bucket: ShapeBucket
    ) -> Generation:
        started = self._start(visual, prompts, bucket)
        state = trim(started.state, choose_cache_length(started))
        if not bucket.stop:
            state = self._step(state, bucket.max_new_tokens, bucket)
        else:
            state = self._step_to_stop_texts(state, bucket)
        return finish(state, started.prune_steps, eos_id=self.eos_id)

    def warm_up(
        self, visual: VisualTokens, prompts: PromptBatch, *, bucket: ShapeBucket
    ) -> list[DecodeState]:
        started, done = self._start(visual, prompts, bucket), []
        for choice in range(started.state.cache.num_lengths):
            if choice:  # its state was given away
                started = self._start(visual, prompts, bucket)
            done.append(self._step(trim(started.state, choice), 1, bucket))  # adds no token
        return done

    def stream(
        self, visual: VisualTokens, prompts: PromptBatch, *, bucket: ShapeBucket
    ) -> Iterator[str]:
        """The text of the first row after each token."""
        started = self._start(visual, prompts, bucket)
        state = trim(started.state, choose_cache_length(started))
        for count in range(1, bucket.max_new_tokens + 1):
            if count > 1:
                state = self._step(state, count, bucket)
            tokens, done = self.shards.fetch((state.tokens, state.done))
            text = self.tokenizer.decode(tokens[0, : count - int(done[0])].tolist())
            yield text
            if done[0] or find_stop(text, bucket.stop) is not None:
                return

    def read(self, outputs: Generation, row: int, *, bucket: ShapeBucket) -> dict[str, Any]:
        tokens = outputs.tokens[row, : outputs.num_tokens[row]].tolist()
        text = self.tokenizer.decode(tokens)
        stop = find_stop(text, bucket.stop)
        if stop is not None:
            tokens, text = self._tokens_to_stop(tokens, bucket.stop), text[:stop]
        return {
            "text": text.strip(),
            "tokens": tuple(tokens),
            "finite": bool(outputs.finite[row]),
            "kept": tuple(int(each.num_kept[row]) for each in outputs.prune_steps),
            "computed": tuple(float(each.num_computed[row]) for each in outputs.prune_steps),
        }

    def _start(self, visual: VisualTokens, prompts: PromptBatch, bucket: ShapeBucket) -> Started:
        return start(
            self.model,
            self.params,
            visual,
            prompts,
            plan=self.plan,
            max_new_tokens=bucket.max_new_tokens,
            eos_id=self.eos_id,
            sampling=bucket.sampling,
        )

    def _step(
        self,
        state: DecodeState,
        limit: int,
        bucket: ShapeBucket,
        ended: np.ndarray | None = None,
    ) -> DecodeState:
        if ended is None:
            ended = np.zeros(len(state.tokens), bool)
        return step(
            self.model,
            self.params,
            state,
            np.int32(limit),
            ended,
            eos_id=self.eos_id,
            sampling=bucket.sampling,
        )

    def _step_to_stop_texts(self, state: DecodeState, bucket: ShapeBucket) -> DecodeState:
        """Looks at the texts after every few tokens, so that rows with a stop text end."""
        ended, count = None, 0
        while count < bucket.max_new_tokens:
            count = min(count + STOP_INTERVAL, bucket.max_new_tokens)
            state = self._step(state, count, bucket, ended)
            tokens, done = self.shards.fetch((state.tokens, state.done))
            texts = [self.tokenizer.decode(row[row != self.eos_id].tolist()) for row in tokens]
            ended = np.array([find_stop(text, bucket.stop) is not None for text in texts])
            if (done | ended).all():
                break
        return state

    def _tokens_to_stop(self, tokens: list[int], stop: Sequence[str]) -> list[int]:
        """Up to the token that completes a stop text."""
        for count in range(1, len(tokens)):
            if find_stop(self.tokenizer.decode(tokens[:count]), stop) is not None:
                return tokens[:count]
        return tokens
