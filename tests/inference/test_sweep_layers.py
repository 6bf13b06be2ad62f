"""What a prune step before each layer does to the answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.data.templates import Conversation, get_template, render, with_images
from meteor_jax.data.tokenizers import load_tokenizer
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference import sweep_layers as sweep_prune_layers
from meteor_jax.inference.sweep_layers import (
    AskedBatch,
    asked_batches,
    kept_overlap,
    measure_prune_layers,
)
from tests import tiny_model as tiny
from tests.evaluation.random_model import config, png

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
    return measure_prune_layers(
        tiny.MODEL, tiny.params(), plan=tiny.plan(plan), batches=[batch], **fields
    )


def test_what_two_questions_keep_alike():
    kept = np.array([[0, 1, 2, -1], [1, 2, 3, 4], [7, 8, 9, -1], [7, 8, 9, -1]])
    assert kept_overlap(kept, of_image=2) == pytest.approx((2 / 3 + 2 / 4 + 1 + 1) / 4)


def record(index, *, questions=2, image=None):
    asked = [
        {"question": f"what is {index} {i}?", "answer": f"{index * 10 + i}"}
        for i in range(questions)
    ]
    return {"image": image or png(index), "qa": asked}


def test_batches_hold_whole_pairs_and_are_filled_up(monkeypatch, tmp_path):
    source = [record(index) for index in range(20)]
    source[3] = record(3, image=b"no image")
    source[4] = record(4, questions=1)
    monkeypatch.setattr(sweep_prune_layers.pipeline, "open_sources", lambda config: [source])
    experiment = load_experiment(config(tmp_path))
    data = experiment.data
    data = dataclasses.replace(data, tasks=("instruction",) * len(data.sources))
    experiment = dataclasses.replace(experiment, data=data)
    tokenizer = load_tokenizer(experiment.data.tokenizer, folder=tmp_path)
    batches = asked_batches(experiment, tokenizer=tokenizer, num_images=19)
    assert [batch.answer_valid.any(1).sum() for batch in batches] == [32, 4]
    first, last = (jax.tree.map(jnp.shape, batch) for batch in batches)
    assert first == last

    questions = [item for index in range(20) if index not in (3, 4) for item in record(index)["qa"]]
    layout = get_template("qa")
    rows = [(batch, row) for batch in batches for row in range(32) if batch.answer_valid[row].any()]
    for (batch, row), item in zip(rows, questions, strict=True):
        turn = (with_images(item["question"], 1, template=layout), item["answer"])
        whole = render(Conversation((turn,)), template=layout, tokenizer=tokenizer)
        answer = batch.answers[row][batch.answer_valid[row]]
        prompt = batch.tokens[row][batch.text_valid[row]]
        # Evaluation stops after three tokens here (eval.max_new_tokens).
        assert len(answer) <= 3
        assert [*prompt, *answer] == whole.tokens[: len(prompt) + len(answer)]
        assert len(prompt) + 3 >= len(whole.tokens) or len(answer) == 3


def test_a_source_of_captions_is_refused_before_it_is_read_whole(monkeypatch, tmp_path):
    read = []

    class Captions:
        def __len__(self):
            return 10**6

        def __getitem__(self, index):
            read.append(index)
            return record(index, questions=1)

    monkeypatch.setattr(sweep_prune_layers.pipeline, "open_sources", lambda config: [Captions()])
    experiment = load_experiment(config(tmp_path))
    tokenizer = load_tokenizer(experiment.data.tokenizer, folder=tmp_path)
    with pytest.raises(ValueError, match="images with 2 questions or more in easy-vqa, found none"):
        asked_batches(experiment, tokenizer=tokenizer, num_images=2)
    assert len(read) < 100


def test_a_plan_that_prunes_by_something_else_is_refused():
    with pytest.raises(ValueError, match="prunes by dart; expected one that prunes by the text's"):
        measure(asked(), plan="dart(layer=1, keep=5)")


@pytest.mark.long
def test_the_loss_is_that_of_reading_prompt_and_answer_at_once():
    batch = asked()
    unpruned, found = measure(batch)
    whole = tiny.make_batch(lengths=(12, 12), with_image=(True, True))
    whole = whole.replace(images=batch.images[:, None])
    plan = tiny.plan("meteor(encode=(26, 22, 30), fuse=20)")
    logits = tiny.forward(tiny.params(), whole, plan=plan).logits[:, -NUM_ANSWER - 1 : -1]
    right = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.answers[..., None], axis=2)
    expected = -float((right[..., 0] * batch.answer_valid).sum()) / 5
    assert unpruned == pytest.approx(expected, rel=1e-4)

    assert [row.layer for row in found] == [1, 2, 3]
    for row in found:
        mean, low, high = row.value
        assert 0 < low <= mean <= high <= 2  # two heads count
        assert 0 < row.same <= 1
        assert len({row.loss, *row.losses_by_chance}) == 1 + sweep_prune_layers.DRAWS
        assert row.loss != pytest.approx(unpruned, rel=1e-6)


@pytest.mark.long
def test_the_answer_has_no_say_in_what_stays():
    batch = asked()
    other = batch.replace(answers=(batch.answers + 7) % tiny.VOCAB)
    (unpruned, found), (unpruned_other, found_other) = measure(batch), measure(other)
    assert unpruned != unpruned_other
    for one, two in zip(found, found_other, strict=True):
        assert (one.same, one.value) == (two.same, two.value)


@pytest.mark.long
def test_one_question_asked_twice_keeps_the_same_and_rows_that_fill_up_do_not_count():
    batch = asked()
    twice = batch.replace(tokens=jnp.repeat(batch.tokens[:1], 2, axis=0))
    unpruned, found = measure(twice)
    assert all(row.same == 1 for row in found)
    assert any(row.same < 1 for row in measure(batch)[1])

    def and_more(one, other):
        return jnp.concatenate([one, other])

    filled = jax.tree.map(and_more, twice, batch.replace(answer_valid=batch.answer_valid & False))
    unpruned_filled, found_filled = measure(filled)
    assert unpruned_filled == pytest.approx(unpruned, rel=1e-5)
    for one, other in zip(found, found_filled, strict=True):
        assert other.same == one.same
        assert other.value == pytest.approx(one.value, rel=1e-5)


@pytest.mark.long
def test_a_cut_of_nothing_costs_nothing_and_an_answer_may_have_one_token():
    batch = asked()
    short = batch.replace(answers=batch.answers[:, :1], answer_valid=batch.answer_valid[:, :1])
    unpruned, found = measure(short, plan="random(keep=9)", share=0.999)
    for row in found:
        assert (row.loss, *row.losses_by_chance) == pytest.approx((unpruned,) * 4, rel=1e-5)
