"""Turns that see the image and not each other: one row answers as if each were asked alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN, Batch
from tests import tiny_model as tiny

SHARED = (1, 7, IMAGE_TOKEN)
TURNS = ((5, 6, 7, 8), (9, 10), (5, 11, 12))


def _batch(rows, *, segments):
    """Rows of (ids, segments), padded; `segments=False` leaves these out of the batch."""
    length = max(len(tokens) for tokens, _ in rows)
    padded = np.zeros((2, len(rows), length), np.int32)
    for index, row in enumerate(rows):
        padded[:, index, : len(row[0])] = row
    valid = np.arange(length) < np.array([len(tokens) for tokens, _ in rows])[:, None]
    images = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32, 3)).astype(np.uint8)
    return Batch(
        images=jnp.asarray(np.repeat(images, len(rows), axis=0)),
        image_valid=jnp.ones((len(rows), 1), bool),
        tokens=jnp.asarray(padded[0]),
        text_valid=jnp.asarray(valid),
        labels=jnp.full(padded[0].shape, IGNORE_LABEL),
        example_id=jnp.arange(len(rows)),
        segment_ids=jnp.asarray(padded[1]) if segments else None,
    )


def _logits(batch, plan):
    return np.asarray(tiny.forward(tiny.params(), batch, plan=plan).logits)


@pytest.mark.parametrize("text", ["full", "stage 1", "stage 2"])
def test_each_turn_apart_is_answered_as_if_it_were_the_only_one(text):
    plan = tiny.plan(tiny.PLANS[text])
    packed = (SHARED + sum(TURNS, ()), (0, 0, 0, *np.repeat([1, 2, 3], [4, 2, 3])))
    apart, conversation = _logits(_batch([packed, _plain(packed[0])], segments=True), plan)
    # One batch without turns: each question in a row of its own, and the whole conversation.
    rows = [_plain(SHARED + turn) for turn in TURNS]
    *alone, plain = _logits(_batch([*rows, _plain(packed[0])], segments=False), plan)
    begin = len(SHARED)
    for turn, expected in zip(TURNS, alone, strict=True):
        stop = begin + len(turn)
        expected = expected[len(SHARED) : len(SHARED) + len(turn)]
        np.testing.assert_allclose(apart[begin:stop], expected, rtol=0, atol=3e-5)
        begin = stop
    # In the same batch a conversation stays one.
    np.testing.assert_allclose(conversation, plain, rtol=0, atol=3e-5)
    later = len(SHARED) + len(TURNS[0])
    assert (np.abs(conversation - apart)[later:].max(axis=-1) > 1e-2).all()


def _plain(tokens):
    return tokens, (0,) * len(tokens)


def test_no_cut_in_the_decoder_can_follow_turns_apart():
    with pytest.raises(ValueError, match="independent questions share"):
        _logits(_batch([(SHARED, (0, 0, 0))], segments=True), tiny.plan(tiny.PLANS["stage 3"]))
