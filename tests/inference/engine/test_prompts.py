"""Requests as prompts."""

import pytest

from meteor_jax.config import ConfigError
from meteor_jax.data.templates import get_template
from meteor_jax.inference.engine.prompts import PromptLimits, make_prompt, place_images
from meteor_jax.inference.engine.request import Request
from meteor_jax.types import IMAGE_TOKEN
from tests.inference.engine.fakes import LIMITS, TOKENIZER, make_engine


def prompt_of(question, *, limits=LIMITS, max_new_tokens=8, **fields):
    return make_prompt(
        Request(question, max_new_tokens=max_new_tokens, **fields),
        plan="full",
        template=get_template("qa"),
        tokenizer=TOKENIZER,
        limits=limits,
    )


def test_images_for_which_there_are_no_positions_are_left_out_with_their_marks():
    limits, images = PromptLimits((16, 64), 140, image_positions=30), (b"a", b"b", b"c")
    prompt = prompt_of("<image>, <image> or <image>?", images=images, limits=limits)
    assert len(prompt.images) == 3 and prompt.bucket.prompt_length == 16
    question = "<image>, <image> or <image>?" + "!" * 40
    shorter = prompt_of(question, images=images, limits=limits)
    assert shorter.images == prompt.images[:2] and shorter.tokens.count(IMAGE_TOKEN) == 2


def test_a_prompt_that_is_too_long_is_one_line():
    with pytest.raises(ConfigError, match="takes 82 tokens, and there is room for 64") as caught:
        make_engine().prepare(Request("x" * 80, max_new_tokens=6))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("questions", "count", "placed"),
    [
        (["what?"], 0, ["what?"]),
        (["what?"], 2, ["<image>\n<image>\nwhat?"]),
        (["of <image> and <image>?"], 2, ["of <image> and <image>?"]),
        (["of <image> and <image>?"], 1, ["of <image> and ?"]),
        (["of <image>?"], 2, ["<image>\nof <image>?"]),
        (["of <image>?"], 0, ["of ?"]),
        (["what?", "and <image>?", "why?"], 2, ["<image>\nwhat?", "and <image>?", "why?"]),
    ],
)
def test_every_image_has_one_place(questions, count, placed):
    assert place_images(questions, count, template=get_template("vicuna_v1")) == placed


def test_a_stop_text_is_a_text_or_several_and_never_empty():
    assert prompt_of("what?", stop="no").bucket.stop == ("no",)
    assert prompt_of("what?", stop=["no", "", "end"]).bucket.stop == ("no", "end")


def test_earlier_turns_stand_before_the_question():
    prompt = prompt_of("and now?", images=[b"a"], history=[("what?", "a dog")])
    text = TOKENIZER.decode(prompt.tokens)
    assert text == "what?: a dogand now?:" and prompt.tokens.index(IMAGE_TOKEN) < 2
