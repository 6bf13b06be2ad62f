"""Requests as prompts: images put in their places, tokenized, and given a static shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from meteor_jax.config import ConfigError
from meteor_jax.data.templates import (
    IMAGE_MARKER,
    Conversation,
    Template,
    render,
    with_images,
)
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.inference.engine.request import Prompt, Request, ShapeBucket

TURN = "\0"  # between the questions of a conversation while images are placed


@dataclasses.dataclass(frozen=True)
class PromptLimits:
    """What a prompt may take up.

    Attributes:
        lengths: static text lengths, ascending; a prompt is padded to the next one.
        positions: that the decoder has, for text, images and answer; None sets no limit.
        image_positions: that an image takes, at most, under any plan of the engine.
    """

    lengths: tuple[int, ...]
    positions: int | None
    image_positions: int

    def text(self, *, num_images: int, max_new_tokens: int) -> int:
        """Text tokens that fit beside so many images and new tokens."""
        if self.positions is None:
            return self.lengths[-1]
        images = max(num_images, 1) * self.image_positions
        return min(self.lengths[-1], self.positions - images - max_new_tokens)


def make_prompt(
    request: Request, *, plan: str, template: Template, tokenizer: Tokenizer, limits: PromptLimits
) -> Prompt:
    """One request as a prompt of its own.

    Where the decoder has not enough positions for all images, the last ones are left out (our
    choice; EAGLE cuts the end of the text off instead).

    Raises:
        ConfigError: if the text alone, with one image, is too long.
    """
    questions = [question for question, _ in request.history] + [request.question]
    answers = [answer for _, answer in request.history] + [None]
    for num_images in range(len(request.images), -1, -1):
        placed = place_images(questions, num_images, template=template)
        conversation = Conversation(tuple(zip(placed, answers, strict=True)))
        tokens = render(conversation, template=template, tokenizer=tokenizer).tokens
        longest = limits.text(num_images=num_images, max_new_tokens=request.max_new_tokens)
        if len(tokens) <= longest:
            length = next(n for n in (*limits.lengths, longest) if n >= len(tokens))
            return Prompt(
                tokens=tuple(tokens),
                images=tuple(request.images[:num_images]),
                bucket=ShapeBucket(
                    prompt_length=min(length, longest),
                    num_images=max(num_images, 1),
                    max_new_tokens=request.max_new_tokens,
                    stop=tuple(request.stop),
                    sampling=request.sampling,
                ),
                plan=plan,
                seed=request.seed,
            )
        if num_images <= 1:
            break
    raise ConfigError(
        f"prompt '{request.question[:40]}' takes {len(tokens)} tokens, and there is room for "
        f"{longest} (eval.prompt_lengths end at {limits.lengths[-1]}; {limits.positions} positions "
        f"for text, {max(num_images, 1)} × {limits.image_positions} of images and "
        f"{request.max_new_tokens} new tokens); raise eval.prompt_lengths or llama.max_positions, "
        "or lower eval.max_new_tokens."
    )


def place_images(questions: Sequence[str], num_images: int, *, template: Template) -> list[str]:
    """The questions with exactly `num_images` marks: missing ones in front, the last ones dropped.

    >>> place_images(["<image> or <image>?"], 1, template=get_template("qa"))
    ['<image> or ?']
    """
    chunks = TURN.join(questions).split(IMAGE_MARKER)
    kept = IMAGE_MARKER.join(chunks[: num_images + 1]) + "".join(chunks[num_images + 1 :])
    marks = kept.count(IMAGE_MARKER)
    return with_images(kept, num_images - marks, template=template).split(TURN)
