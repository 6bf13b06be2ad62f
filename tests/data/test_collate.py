"""Examples and prompts of any length as arrays of one shape."""

import dataclasses

import numpy as np
import pytest

from meteor_jax.data.examples import Example
from meteor_jax.data.pipeline import collate, collate_prompts
from meteor_jax.data.templates import Conversation, get_template, render, with_images
from meteor_jax.data.tokenizers import ByteTokenizer
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN

TOKENIZER = ByteTokenizer()


def test_collate_takes_no_one_or_two_images():
    picture = np.full((8, 8, 3), 7, np.uint8)
    template, examples = get_template("vicuna_v1"), []
    for number in range(3):
        question = with_images("q?", number, template=template)
        text = render(Conversation(((question, "a"),)), template=template, tokenizer=TOKENIZER)
        examples.append(Example((picture,) * number, text.tokens, text.labels, number))
    options = {"image_size": 8, "text_length": 250, "pad_id": TOKENIZER.pad_id}
    batch = collate(examples, max_images=2, **options)
    assert batch.image_valid.tolist() == [[False, False], [True, False], [True, True]]
    assert (batch.images.any((2, 3, 4)) == batch.image_valid).all()
    assert ((batch.tokens == IMAGE_TOKEN).sum(1) == [0, 1, 2]).all()
    with pytest.raises(ValueError, match=r"example 2: 2 image tokens and 2 images; .* at most 1"):
        collate(examples, max_images=1, **options)
    with pytest.raises(ValueError, match="example 1: 1 image tokens and 0 images"):
        collate([dataclasses.replace(examples[1], images=())], max_images=1, **options)
    with pytest.raises(ValueError, match=r"example 0 takes .* text_length is 10"):
        collate(examples, max_images=2, **(options | {"text_length": 10}))


def test_prompts_are_what_training_has():
    prompts = collate_prompts(
        ["q0?", "longer question?"],
        tokenizer=TOKENIZER,
        template="qa",
        text_length=30,
        batch_size=4,
    )
    assert prompts.tokens.shape == prompts.text_valid.shape == (4, 30)
    np.testing.assert_array_equal(prompts.tokens[2:], prompts.tokens[[1, 1]])
    trained = _first_turn("q0?", "yes")
    length = prompts.text_valid[0].sum()
    assert prompts.tokens[0, :length].tolist() == trained.tokens[:length]
    assert trained.labels[length - 1] == IGNORE_LABEL and trained.labels[length] != IGNORE_LABEL


def _first_turn(question, answer):
    template = get_template("qa")
    turns = ((with_images(question, 1, template=template), answer),)
    return render(Conversation(turns), template=template, tokenizer=TOKENIZER)


def test_a_prompt_too_long_is_one_line():
    with pytest.raises(ValueError, match=r"prompt 'q{40}' takes 103 tokens, text_length is 60"):
        collate_prompts(
            ["q" * 100], tokenizer=TOKENIZER, template="qa", text_length=60, batch_size=1
        )
    with pytest.raises(ValueError, match="expected 1 to 2 questions, got 3"):
        collate_prompts(["q"] * 3, tokenizer=TOKENIZER, template="qa", text_length=60, batch_size=2)
