"""Questions as prompts: images put in their places, tokenized, and given a static shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

from meteor_jax.config import ConfigError
from meteor_jax.data.templates import (
    IMAGE_MARKER,
    Conversation,
    Template,
    render,
    with_images,
)
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.inference.engine.batching import Ask, Shape


@dataclasses.dataclass(frozen=True)
class Room:
    """What a prompt may take up.

    Attributes:
        lengths: static text lengths, ascending; a prompt is padded to the next one.
        positions: that the decoder has, for text, images and answer.
        image_positions: that an image takes, at most, under any plan that is asked.
    """

    lengths: tuple[int, ...]
    positions: int
    image_positions: int

    def text(self, *, num_images: int, max_new_tokens: int) -> int:
        """Text tokens for which there is room."""
        images = max(num_images, 1) * self.image_positions
        return min(self.lengths[-1], self.positions - images - max_new_tokens)


def make_ask(
    question: str,
    *,
    images: Sequence[Hashable],
    max_new_tokens: int,
    template: Template,
    tokenizer: Tokenizer,
    room: Room,
) -> Ask:
    """One question as a prompt of its own.

    An `<image>` in the question is the place of an image; images without one come first. Where
    the decoder has not enough positions for all images, the last ones are left out (our choice;
    EAGLE cuts the end of the text off instead).

    Raises:
        ConfigError: if the text alone, with one image, is too long.
    """
    for num_images in range(len(images), -1, -1):
        text = place_images(question, num_images, template=template)
        tokens = render(
            Conversation(((text, None),)), template=template, tokenizer=tokenizer
        ).tokens
        longest = room.text(num_images=num_images, max_new_tokens=max_new_tokens)
        if len(tokens) <= longest:
            length = next(n for n in (*room.lengths, longest) if n >= len(tokens))
            shape = Shape(min(length, longest), max(num_images, 1), max_new_tokens)
            return Ask(tuple(tokens), tuple(images[:num_images]), shape)
        if num_images <= 1:
            break
    raise ConfigError(
        f"prompt '{question[:40]}' takes {len(tokens)} tokens, and there is room for {longest} "
        f"(eval.prompt_lengths end at {room.lengths[-1]}; {room.positions} positions for text, "
        f"{max(num_images, 1)} × {room.image_positions} of images and {max_new_tokens} new tokens);"
        " raise eval.prompt_lengths or llama.max_positions, or lower eval.max_new_tokens."
    )


def place_images(question: str, num_images: int, *, template: Template) -> str:
    """The question with exactly `num_images` marks: missing ones in front, the last ones dropped.

    >>> place_images("<image> or <image>?", 1, template=get_template("qa"))
    '<image> or ?'
    """
    chunks = question.split(IMAGE_MARKER)
    kept = IMAGE_MARKER.join(chunks[: num_images + 1]) + "".join(chunks[num_images + 1 :])
    return with_images(kept, num_images - kept.count(IMAGE_MARKER), template=template)
