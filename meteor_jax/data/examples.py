"""From a record to one row: the text that fits, and the images.

A record is what a source holds: {"image": encoded bytes, "caption": str, "image_id": int,
"qa": [{"question": str, "answer": str, …}, …]}, or a conversation: {"images": encoded bytes of
each, "turns": [(question, answer), …], "image_id": int}.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from meteor_jax.data.config import Attention, DataConfig, Task
from meteor_jax.data.sources import registry as sources
from meteor_jax.data.sources.conversations import place_images
from meteor_jax.data.sources.records import Record, Records
from meteor_jax.data.templates import (
    Conversation,
    Rendered,
    Template,
    render,
    render_turn,
    with_images,
)
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.types import IGNORE_LABEL, IMAGE_TOKEN

SKIPPED_ID = -1  # the example_id of a row that could not be read; sum `example_id < 0` to count

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Example:
    """One row before it is padded: `images` are uint8[H, W, 3], lists hold at most T ids;
    `segment_ids` is None where attention is causal, `target` the index of an answer, if any."""

    images: tuple[np.ndarray, ...]
    tokens: list[int]
    labels: list[int]
    example_id: int
    segment_ids: list[int] | None = None
    target: int = -1


class ExampleTooLong(ValueError):
    """An example without a turn that fits the text length. The message is one line."""


class NoClass(ValueError):
    """An example without an answer that is a class. The message is one line."""


def pack_questions(
    pairs: Sequence[tuple[str, str]],
    *,
    num_images: int,
    max_turns: int,
    template: Template,
    tokenizer: Tokenizer,
    text_length: int,
    attention: Attention = "causal",
) -> Rendered:
    """A conversation of the first `max_turns` of `pairs` that fit whole, in their order.

    With attention "independent_qa" each is written as the first of a conversation is, and what
    that begins with, up to the last image, stands once.

    Raises:
        ExampleTooLong: not even one does.
    """
    if not pairs:
        raise ExampleTooLong("it has no questions.")
    independent = attention == "independent_qa"
    tokens, labels, segment_ids, shortest, count = [], [], [], None, 0
    for question, answer in pairs:
        first = count == 0 or independent
        if first:
            question = with_images(question, num_images, template=template)
        turn = render_turn(question, answer, first=first, template=template, tokenizer=tokenizer)
        shared = _num_shared(turn.tokens) if independent else 0
        start = shared if count else 0
        length = len(turn.tokens) - start
        if len(tokens) + length <= text_length:
            count += 1
            tokens, labels = tokens + turn.tokens[start:], labels + turn.labels[start:]
            segment_ids += [0] * (shared - start) + [count] * (len(turn.tokens) - shared)
        elif count == 0:
            shortest = length if shortest is None else min(shortest, length)
        if count == max_turns:
            break
    if not count:
        raise ExampleTooLong(
            f"the shortest of {len(pairs)} questions with its answer takes {shortest} tokens, "
            f"text_length is {text_length}; raise text_length or shorten the answers."
        )
    return Rendered(tokens, labels, segment_ids if independent else None)


def _num_shared(tokens: Sequence[int]) -> int:
    """How many ids of a conversation's first turn there are up to its last image."""
    return max((place + 1 for place, token in enumerate(tokens) if token == IMAGE_TOKEN), default=0)


def cut_text(text: Rendered, *, text_length: int) -> Rendered:
    """The first `text_length` ids of a conversation.

    Raises:
        ExampleTooLong: an image, or every answer, lies past them.
    """
    cut = Rendered(text.tokens[:text_length], text.labels[:text_length])
    if IMAGE_TOKEN in text.tokens[text_length:] or all(x == IGNORE_LABEL for x in cut.labels):
        raise ExampleTooLong(
            f"of its {len(text.tokens)} tokens text_length={text_length} would cut "
            f"{'an image' if cut.num_images < text.num_images else 'every answer'} off."
        )
    return cut


@dataclasses.dataclass(frozen=True)
class RecordReader:
    """All sources one after the other; the first that are read stay in memory."""

    config: DataConfig
    sources: tuple[Records, ...]
    kept: dict[int, Record] = dataclasses.field(default_factory=dict)

    def training(self, source: int) -> range:
        """The numbers of a source's records that train."""
        start, held_out = sum(map(len, self.sources[:source])), self.config.held_out
        count = len(self.sources[source])
        if held_out >= count:
            raise ValueError(
                f"held_out: {held_out} of the {count} records of '{self.config.sources[source]}' "
                "leave none to train on."
            )
        return range(start, start + count - held_out)

    def held_out(self, source: int) -> range:
        """The numbers of those that do not."""
        stop = self.training(source).stop
        return range(stop, stop + self.config.held_out)

    def read(self, index: int) -> Record:
        if index in self.kept:
            return self.kept[index]
        within = index
        for source in self.sources:
            if within < len(source):
                record = source[within]
                if len(self.kept) < self.config.record_cache_size:
                    self.kept[index] = record
                return record
            within -= len(source)
        raise IndexError(f"no record {index} past the last source.")


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """The n-th record of all sources to an `Example`; a class, so that workers can unpickle it."""

    config: DataConfig
    tokenizer: Tokenizer
    template: Template
    task: Task
    reader: RecordReader

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        record = self.reader.read(index)
        target = -1
        try:
            if self.task == "classification":
                text, target = self._classified(record, rng)
            else:
                text = self._conversation(record) if "turns" in record else self._text(record, rng)
            encoded = record["images"] if "turns" in record else (record["image"],)
            images = tuple(
                sources.decode_image(image, size=self.config.image_size) for image in encoded
            )
        except (sources.CorruptImage, ExampleTooLong, NoClass) as error:
            logger.error("example %d skipped: %s", record["image_id"], error)
            return self.skipped()
        return Example(
            images, text.tokens, text.labels, record["image_id"], text.segment_ids, target
        )

    def skipped(self) -> Example:
        return Example((), [self.tokenizer.pad_id], [IGNORE_LABEL], SKIPPED_ID)

    def _text(self, record: Record, rng: np.random.Generator) -> Rendered:
        if self.task == "captioning":
            pairs = [(self.config.caption_question, record["caption"])]
        else:
            order = rng.permutation(len(record["qa"]))
            pairs = [(record["qa"][i]["question"], record["qa"][i]["answer"]) for i in order]
        return pack_questions(
            pairs,
            num_images=1,
            max_turns=self.config.questions_per_image,
            template=self.template,
            tokenizer=self.tokenizer,
            text_length=self.config.text_length,
            attention=self.config.attention,
        )

    def _classified(self, record: Record, rng: np.random.Generator) -> tuple[Rendered, int]:
        """A question, and its answer as a class."""
        classes = self.config.classes
        known = [item for item in record.get("qa", ()) if item["answer"] in classes]
        if not known:
            raise NoClass("none of its answers is in data.classes.")
        item = known[rng.integers(len(known))]
        question = with_images(item["question"], 1, template=self.template)
        prompt = Conversation(((question, None),))
        text = render(prompt, template=self.template, tokenizer=self.tokenizer)
        if len(text.tokens) > self.config.text_length:
            raise ExampleTooLong(
                f"its question takes {len(text.tokens)} tokens, text_length is "
                f"{self.config.text_length}; raise text_length."
            )
        return text, classes.index(item["answer"])

    def _conversation(self, record: Record) -> Rendered:
        num_images = len(record["images"])
        if num_images > self.config.max_images:
            raise ExampleTooLong(
                f"it has {num_images} images, max_images={self.config.max_images}."
            )
        if not num_images and not self.template.keeps_question:
            raise ExampleTooLong("it has no image, and this template drops its question.")
        turns = place_images(record["turns"], num_images, template=self.template)
        whole = render(Conversation(turns), template=self.template, tokenizer=self.tokenizer)
        return cut_text(whole, text_length=self.config.text_length)
