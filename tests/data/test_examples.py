"""A row of text out of questions and answers: whole turns, that see each other or stand apart."""

import numpy as np
import pytest

from meteor_jax.data.examples import ExampleTooLong, pack_questions
from meteor_jax.data.templates import Conversation, get_template, render, with_images
from meteor_jax.data.tokenizers import ByteTokenizer
from meteor_jax.types import IMAGE_TOKEN

TOKENIZER = ByteTokenizer()


def _pack(pairs, text_length, max_turns=9, num_images=1, attention="causal"):
    return pack_questions(
        pairs,
        num_images=num_images,
        max_turns=max_turns,
        template=get_template("vicuna_v1"),
        tokenizer=TOKENIZER,
        text_length=text_length,
        attention=attention,
    )


def _whole(pairs, num_images=1):
    template = get_template("vicuna_v1")
    (question, answer), *rest = pairs
    first = (with_images(question, num_images, template=template), answer)
    return render(Conversation((first, *rest)), template=template, tokenizer=TOKENIZER)


def test_turns_apart_are_each_written_as_the_only_one():
    pairs = [("long?", "x" * 50), ("q?", "a"), ("r?", "bc")]
    alone = [_whole([pair]) for pair in pairs[1:]]
    shared = alone[0].tokens.index(IMAGE_TOKEN) + 1
    length = sum(len(text.tokens) for text in alone) - shared
    packed = _pack(pairs, length, attention="independent_qa")
    assert packed.tokens == alone[0].tokens + alone[1].tokens[shared:]
    assert packed.labels == alone[0].labels + alone[1].labels[shared:]
    counts = [shared, *(len(text.tokens) - shared for text in alone)]
    assert packed.segment_ids == list(np.repeat([0, 1, 2], counts))
    assert _pack(pairs, length - 1, attention="independent_qa").tokens == alone[0].tokens


def test_packing_keeps_whole_turns_only():
    long, short, other = ("long?", "x" * 50), ("q?", "a"), ("r?", "bc")
    full = len(_whole([short, long, other]).tokens)
    assert _pack([short, long, other], full) == _whole([short, long, other])
    assert _pack([short, long, other], full - 1) == _whole([short, long])
    assert _pack([short, long, other], len(_whole([short, long]).tokens) - 1) == _whole(
        [short, other]
    )
    # Where the first does not fit, the next one brings the opening and the image.
    assert _pack([long, short], len(_whole([short]).tokens)) == _whole([short])
    assert _pack([short, long, other], full, max_turns=2) == _whole([short, long])
    with pytest.raises(ExampleTooLong, match=r"takes \d+ tokens, text_length is 50"):
        _pack([long, short], 50)
    with pytest.raises(ExampleTooLong, match="no questions"):
        _pack([], 50)
