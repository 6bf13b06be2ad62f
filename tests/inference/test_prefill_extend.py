"""Prefill and extend: what the cache answers equals what the whole row answers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.eagle.fusion import splice
from tests import tiny_model as tiny


@pytest.mark.parametrize(
    "text",
    [
        "full",
        "stage 2",
        "stage 3",
        "meteor",
        *(pytest.param(text, marks=pytest.mark.long) for text in ("stage 1", "pyramiddrop")),
    ],
)
def test_prefill_then_extend_equals_one_forward_over_the_same_kept_tokens(text):
    """Tokens are dropped once, by the prompt. So the reference runs the longer row through the
    layers by hand, over the entries that the prefill kept in each range of layers."""
    plan, batch = tiny.plan(tiny.PLANS[text]), tiny.make_batch()
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    new = np.random.default_rng(1).integers(3, tiny.VOCAB, (3, 5)).astype(np.int32)
    prefilled = tiny.prefill(tiny.params(), visual, batch, plan=plan, max_new_tokens=6)
    first = tiny.extend(tiny.params(), prefilled.cache, new[:, :3])
    second = tiny.extend(tiny.params(), first.cache, new[:, 3:])
    stepwise = np.concatenate([first.logits, second.logits], axis=1)
    for i in range(3):
        steps = [np.asarray(step.visual[i]) for step in prefilled.prune_steps]
        reference = _forward_over_kept(
            tiny.row(batch, i), new[i], tiny.row(visual, i), steps, plan=plan
        )
        np.testing.assert_allclose(stepwise[i], reference, rtol=0, atol=3e-5)


LENGTH = tiny.NUM_VISUAL + tiny.TEXT_LENGTH + 5  # of the longest row and its new tokens


@functools.partial(jax.jit, static_argnames="index")
def _padded_layer(params, x, position, *, index):
    return tiny.MODEL.apply(
        {"params": params},
        method=lambda model: model.llama.run(x, position, start=index, stop=index + 1).x,
    )


@jax.jit
def _padded_logits(params, x):
    return tiny.MODEL.apply({"params": params}, method=lambda model: model.llama.logits(x))


def _pad(x):
    """To one length for all rows, so that a layer is compiled once; nothing sees the padding."""
    return np.pad(x, ((0, 0), (0, LENGTH - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def _layers(x, position, *, start, stop):
    length = x.shape[1]
    x, position = _pad(x), _pad(position)
    for index in range(start, stop):
        x = _padded_layer(tiny.params(), x, position, index=index)
    return np.asarray(x)[:, :length]


@jax.jit
def _join(params, batch, new, visual):
    """The prompt with its image, and the embedded new tokens."""

    def join(model):
        start = splice(
            model.llama.embed(jnp.maximum(batch.tokens, 0)),
            tokens=batch.tokens,
            text_valid=batch.text_valid,
            visual=visual,
            image_valid=batch.image_valid,
        )
        return start, model.llama.embed(new[None])

    return tiny.MODEL.apply({"params": params}, method=join)


def _forward_over_kept(batch, new, visual, steps, *, plan):
    """Logits of `new` behind one prompt, without any cache: whole rows, dense attention."""
    start, embedded = _join(tiny.params(), batch, new, visual)
    bounds = (0, *plan.decoder_layers, tiny.CONFIG.llama.depth)
    kept = np.flatnonzero(np.asarray(start.valid[0]))
    x = np.concatenate([np.asarray(start.x)[:, kept], np.asarray(embedded)], axis=1)
    index = np.asarray(start.visual[0])[kept]
    position = np.asarray(start.position[0])[kept]
    after = position[-1] + 1
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        if number:
            left = steps[number - 1]
            stay = (index < 0) | np.isin(index, left[left >= 0])
            rows = np.concatenate([np.flatnonzero(stay), index.size + np.arange(new.size)])
            x, index, position = x[:, rows], index[stay], position[stay]
            if plan.decoder_steps[0].positions == "contiguous":
                position = np.arange(index.size)
                after = index.size
        where = np.concatenate([position, after + np.arange(new.size)])[None]
        x = _layers(x, where, start=first, stop=last)
    logits = _padded_logits(tiny.params(), _pad(x))
    return np.asarray(logits)[0, x.shape[1] - new.size : x.shape[1]]


def test_shapes_are_static():
    plan = tiny.plan(tiny.METEOR)

    # Functions of their own: jitted twins of one function share a cache.
    @jax.jit
    def prefill(params, visual, batch):
        return tiny.prefill.__wrapped__(params, visual, batch, plan=plan, max_new_tokens=4)

    @jax.jit
    def extend(params, cache, tokens):
        return tiny.extend.__wrapped__(params, cache, tokens)

    for seed in range(10):
        lengths = tuple(np.random.default_rng(seed).integers(4, 13, 3).tolist())
        batch = tiny.make_batch(lengths=lengths, with_image=(True, seed % 2 > 0, False), seed=seed)
        visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
        prefilled = prefill(tiny.params(), visual, batch)
        extend(tiny.params(), prefilled.cache, batch.tokens[:, :1] * 0 + seed)
    assert prefill._cache_size() == 1
    assert extend._cache_size() == 1
