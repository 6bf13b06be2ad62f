"""The model under one plan, as an evaluation calls it.

S lanes, I images of a lane in one batch, b prompts of a lane, B = S·b prompts, T prompt tokens,
M images of a prompt, N visual tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.inference.engine.data_shards import split_by_rows
from meteor_jax.inference.generate import Generated, Started, choose_cache_length, decode, start
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import IMAGE_TOKEN, Array, VisualTokens


@flax.struct.dataclass
class Replies:
    """A batch's answers, still on the device.

    Shapes:
        tokens: int32[B, max_new_tokens]; num_tokens: int32[B].
        finite: bool[B]; False where logits were NaN or infinite.
        kept: int32[B] a cut in the LLM: visual tokens kept.
        computed: float32[B] a cut: visual tokens that the layers after it computed.
    """

    tokens: Array
    num_tokens: Array
    finite: Array
    kept: tuple[Array, ...] = ()
    computed: tuple[Array, ...] = ()


@flax.struct.dataclass
class Rows:
    """A batch of prompts: [S, b, ...] as hosts lay them out, [B, ...] as the model takes them.

    Shapes:
        tokens: int32[..., T]; text_valid: bool[..., T]; image_valid: bool[..., M].
    """

    tokens: Array
    text_valid: Array
    image_valid: Array


class Answerer(Protocol):
    """A model under one plan. A call returns before it is done, or, where the budget of stage 3 is
    adaptive, when the prefill is."""

    sees_images: bool

    def encode(self, images: Array) -> VisualTokens:
        """VisualTokens of [S, I, N, D] for uint8[S, I, H, W, 3]."""

    def answer(self, visual: VisualTokens, rows: Rows, *, max_new_tokens: int) -> Replies:
        """Replies to B prompts about their images in `visual`, [B, M, N, D]."""

    def warm_up(self, visual: VisualTokens, rows: Rows, *, max_new_tokens: int) -> Any:
        """Compiles whatever `answer` may run for such shapes; returns what is to be waited for."""


@dataclasses.dataclass(frozen=True)
class ModelAnswerer:
    """A `Meteor` and its parameters; see `Answerer`."""

    model: nn.Module
    params: Any
    plan: PrunePlan
    eos_id: int
    sees_images: bool = True

    def encode(self, images: Array) -> VisualTokens:
        return encode_images(self.params, images, model=self.model, plan=self.plan)

    def answer(self, visual: VisualTokens, rows: Rows, *, max_new_tokens: int) -> Replies:
        started = self._start(visual, rows, max_new_tokens=max_new_tokens)
        generated = self._decode(
            started, max_new_tokens=max_new_tokens, cache_length=choose_cache_length(started)
        )
        return Replies(
            tokens=generated.tokens,
            num_tokens=generated.num_tokens,
            finite=generated.finite,
            kept=tuple(step.num_kept for step in generated.prune_steps),
            computed=tuple(step.num_computed for step in generated.prune_steps),
        )

    def warm_up(self, visual: VisualTokens, rows: Rows, *, max_new_tokens: int) -> Any:
        started, done = self._start(visual, rows, max_new_tokens=max_new_tokens), []
        for choice in range(started.cache.num_lengths):
            done.append(self._decode(started, max_new_tokens=max_new_tokens, cache_length=choice))
            # Its cache was given away.
            started = self._start(visual, rows, max_new_tokens=max_new_tokens)
        return done

    def _start(self, visual: VisualTokens, rows: Rows, *, max_new_tokens: int) -> Started:
        return start(
            self.model,
            self.params,
            visual,
            image_valid=rows.image_valid,
            tokens=rows.tokens,
            text_valid=rows.text_valid,
            plan=self.plan,
            max_new_tokens=max_new_tokens,
            key=jax.random.key(0),
        )

    def _decode(self, started: Started, *, max_new_tokens: int, cache_length: int) -> Generated:
        return decode(
            self.model,
            self.params,
            started,
            max_new_tokens=max_new_tokens,
            eos_id=self.eos_id,
            key=jax.random.key(0),
            cache_length=cache_length,
        )


@dataclasses.dataclass(frozen=True)
class BlindAnswerer(ModelAnswerer):
    """The model with no image: one visual token that is never read stands in for it."""

    sees_images: bool = False

    def encode(self, images: Array) -> VisualTokens:
        shape = fused_shape(self.model, self.params, plan=self.plan)
        return jax.tree.map(
            lambda leaf: jnp.zeros((*images.shape[:2], 1, *leaf.shape[2:]), leaf.dtype), shape
        )


def fused_shape(model: nn.Module, params: Any, *, plan: PrunePlan) -> VisualTokens:
    """Shapes of one image's `encode_images`, [1, N, D], without computing it.

    Raises:
        ValueError: if the plan does not fit the model.
    """
    size = model.config.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    return jax.eval_shape(
        lambda params, images: (
            model.apply({"params": params}, images, plan=plan, method="encode_images").tokens
        ),
        params,
        images,
    )


def check_fits(model: nn.Module, params: Any, *, plan: PrunePlan) -> VisualTokens:
    """Traces all stages of a plan for a prompt of one image, without computing anything; returns
    `fused_shape`.

    Raises:
        ValueError: if the plan does not fit the model.
    """
    fused = fused_shape(model, params, plan=plan)
    plan = plan.with_placeholder_lambda()

    def first_token(params: Any, visual: VisualTokens) -> Array:
        prompt = jnp.full((1, 2), IMAGE_TOKEN).at[0, 1].set(0)
        return model.apply(
            {"params": params},
            jax.tree.map(lambda x: x[:, None], visual),
            image_valid=jnp.ones((1, 1), bool),
            tokens=prompt,
            text_valid=jnp.ones((1, 2), bool),
            plan=plan,
            max_new_tokens=0,
            method="prefill",
        ).logits

    jax.eval_shape(first_token, params, fused)
    return fused


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def encode_images(params: Any, images: Array, *, model: nn.Module, plan: PrunePlan) -> VisualTokens:
    """VisualTokens of [S, I, N, D] for uint8[S, I, H, W, 3]."""
    lanes = images.shape[:2]
    flat = split_by_rows(images.reshape(-1, *images.shape[2:]))
    encoded = model.apply({"params": params}, flat, plan=plan, method="encode_images")
    return jax.tree.map(
        lambda leaf: split_by_rows(leaf.reshape(*lanes, *leaf.shape[1:])), encoded.tokens
    )
