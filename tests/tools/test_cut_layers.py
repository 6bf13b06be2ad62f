"""What a cut before each layer does to the answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.tools.cut_layers import AskedBatch, kept_alike, measure_cut_layers
from meteor_jax.types import IMAGE_TOKEN
from tests import tiny_model as tiny

NUM_ANSWER = 3  # the last places of a row of 12


@functools.cache
def asked():
    """Two rows about one image: nine tokens of a prompt, three and two of an answer."""
    rows = tiny.make_batch(lengths=(12, 12), with_image=(True, True))
    prompt = np.array(rows.tokens)
    prompt[:, -NUM_ANSWER:] = 0
    place = jnp.arange(12) < 12 - NUM_ANSWER
    return AskedBatch(
        images=jnp.repeat(rows.images[:1, 0], 2, axis=0),
        tokens=jnp.asarray(prompt),
        text_valid=jnp.broadcast_to(place, (2, 12)),
        answers=rows.tokens[:, -NUM_ANSWER:],
        answer_valid=jnp.array([[True, True, True], [True, True, False]]),
    )


def measure(batch, *, plan=tiny.METEOR, **fields):
    return measure_cut_layers(
        tiny.MODEL, tiny.params(), plan=tiny.plan(plan), batches=[batch], **fields
    )


def test_what_two_questions_keep_alike():
    kept = np.array([[0, 1, 2, -1], [1, 2, 3, 4], [7, 8, 9, -1], [7, 8, 9, -1]])
    assert kept_alike(kept, of_image=2) == pytest.approx((2 / 3 + 2 / 4 + 1 + 1) / 4)


@pytest.mark.long
def test_the_loss_is_that_of_reading_prompt_and_answer_at_once():
    batch = asked()
    uncut, found = measure(batch)
    whole = tiny.make_batch(lengths=(12, 12), with_image=(True, True))
    whole = whole.replace(images=batch.images[:, None])
    plan = tiny.plan("meteor(encode=(26, 22, 30), fuse=20)")
    logits = tiny.forward(tiny.params(), whole, plan=plan).logits[:, -NUM_ANSWER - 1 : -1]
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.answers[..., None], axis=2)
    expected = -float((right[..., 0] * batch.answer_valid).sum()) / 5
    assert uncut == pytest.approx(expected, rel=1e-4)

    assert [row.layer for row in found] == [1, 2, 3]
    for row in found:
        mean, low, high = row.value
        assert 0 < low <= mean <= high <= 1
        assert 0 < row.same <= 1
        assert row.loss != pytest.approx(row.loss_by_chance, rel=1e-6)
        assert row.loss != pytest.approx(uncut, rel=1e-6)


@pytest.mark.long
def test_the_answer_has_no_say_in_what_stays():
    batch = asked()
    other = batch.replace(answers=(batch.answers + 7) % tiny.VOCAB)
    (uncut, found), (uncut_other, found_other) = measure(batch), measure(other)
    assert uncut != uncut_other
    for one, two in zip(found, found_other, strict=True):
        assert (one.same, one.value) == (two.same, two.value)


@pytest.mark.long
def test_one_question_asked_twice_keeps_the_same_and_a_cut_of_nothing_costs_nothing():
    batch = asked()
    twice = batch.replace(tokens=jnp.repeat(batch.tokens[:1], 2, axis=0))
    assert (np.asarray(twice.tokens) == IMAGE_TOKEN).sum() == 2
    uncut, found = measure(twice, plan="random(keep=9)", share=0.999)
    for row in found:
        assert row.same == 1
        assert row.loss == row.loss_by_chance == pytest.approx(uncut, rel=1e-5)
