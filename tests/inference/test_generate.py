"""Answers: greedy, sampled, ended; rows on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.inference.generate import (
    Sampling,
    choose_cache_length,
    draw,
    generate,
    is_sound,
    start,
)
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import override
from tests import tiny_model as tiny

EOS = 1


def answer(batch, plan, **options):
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    return generate(
        tiny.MODEL,
        tiny.params(),
        visual,
        image_valid=batch.image_valid,
        tokens=batch.tokens,
        text_valid=batch.text_valid,
        plan=plan,
        max_new_tokens=5,
        eos_id=EOS,
        **options,
    )


def test_greedy_equals_asking_the_whole_row_again_for_each_token():
    batch = tiny.make_batch(text_length=18)
    generated = np.asarray(answer(batch, PrunePlan()).tokens)
    lengths = np.asarray(batch.text_valid).sum(1)
    tokens, valid = np.array(batch.tokens), np.array(batch.text_valid)
    for step in range(5):
        row = batch.replace(tokens=jnp.asarray(tokens), text_valid=jnp.asarray(valid))
        logits = np.asarray(tiny.forward(tiny.params(), row, plan=PrunePlan()).logits)
        for i, length in enumerate(lengths + step):
            expected = logits[i, length - 1].argmax()
            ended = EOS in generated[i, :step]
            assert generated[i, step] == (EOS if ended else expected)
            tokens[i, length], valid[i, length] = generated[i, step], True


def test_after_the_end_only_ends_follow_and_are_not_counted():
    batch = tiny.make_batch()
    first = answer(batch, PrunePlan())
    eos = int(first.tokens[0, 1])
    visual = tiny.encode(tiny.params(), batch.images, plan=PrunePlan()).tokens
    ended = generate(
        tiny.MODEL,
        tiny.params(),
        visual,
        image_valid=batch.image_valid,
        tokens=batch.tokens,
        text_valid=batch.text_valid,
        plan=PrunePlan(),
        max_new_tokens=5,
        eos_id=eos,
    )
    stop = np.argmax(np.asarray(first.tokens[0]) == eos)
    assert ended.num_tokens[0] == stop
    assert (np.asarray(ended.tokens[0])[stop:] == eos).all()


def test_a_pruned_answer_does_not_depend_on_batch_mates():
    plan, batch = tiny.plan(tiny.METEOR), tiny.make_batch()
    together = answer(batch, plan).tokens
    for i in range(3):
        alone = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        np.testing.assert_array_equal(answer(alone, plan).tokens[0], together[i])


def test_a_row_whose_logits_are_not_finite_is_flagged_and_disturbs_no_other():
    plan, batch = tiny.plan(tiny.METEOR), tiny.make_batch(with_image=(True, True, True))
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    broken = visual.replace(x=visual.x.at[1].set(jnp.nan))
    options = {
        "image_valid": batch.image_valid,
        "tokens": batch.tokens,
        "plan": plan,
        "eos_id": EOS,
        "text_valid": batch.text_valid,
        "max_new_tokens": 5,
    }
    sound = generate(tiny.MODEL, tiny.params(), visual, **options)
    assert np.asarray(sound.finite).all()
    found = generate(tiny.MODEL, tiny.params(), broken, **options)
    np.testing.assert_array_equal(found.finite, [True, False, True])
    np.testing.assert_array_equal(found.tokens[::2], sound.tokens[::2])


def test_a_token_that_cannot_come_is_no_fault():
    inf = jnp.inf
    logits = jnp.array([[0.0, -inf], [jnp.nan, 0.0], [inf, 0.0], [-inf, -inf]])
    np.testing.assert_array_equal(is_sound(logits), [True, False, False, False])


def test_the_cache_is_cut_to_what_the_longest_row_keeps():
    """Rows that keep few tokens are decoded over a shorter cache."""
    plan, batch = tiny.plan(tiny.METEOR), tiny.make_batch()
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    for lambda_, choice in ((1e-9, 0), (1e9, 1)):
        scaled = override(plan, **{"decode.lambda_": lambda_})
        started = start(
            tiny.MODEL,
            tiny.params(),
            visual,
            image_valid=batch.image_valid,
            tokens=batch.tokens,
            text_valid=batch.text_valid,
            plan=scaled,
            max_new_tokens=5,
            key=jax.random.key(0),
        )
        assert choose_cache_length(started) == choice


def test_top_p_draws_only_from_the_likely():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 400))
    sampling = Sampling(temperature=1.0, top_p=0.7)
    drawn = np.asarray(draw(logits, sampling=sampling, key=jax.random.key(0)))
    assert set(drawn.tolist()) == {0, 1}
    assert 0.5 < (drawn == 0).mean() < 0.75  # 5 to 3
    certain = draw(logits, sampling=Sampling(1.0, 0.4), key=jax.random.key(0))
    assert (np.asarray(certain) == 0).all()


def test_temperature_needs_a_key_and_sensible_numbers():
    with pytest.raises(ValueError, match=r"key=jax.random.key"):
        answer(tiny.make_batch(), PrunePlan(), sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="0 < top_p"):
        Sampling(top_p=0.0)


def test_the_same_key_draws_the_same():
    options = {"sampling": Sampling(temperature=2.0), "key": jax.random.key(3)}
    one, other = (answer(tiny.make_batch(), PrunePlan(), **options).tokens for _ in range(2))
    np.testing.assert_array_equal(one, other)
