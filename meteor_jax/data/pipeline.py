"""Examples to batches: a grain pipeline of static shapes that resumes exactly.

A record is what a source holds: {"image": encoded bytes, "caption": str, "image_id": int,
"qa": [{"question": str, "answer": str, …}, …]}.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import grain
import numpy as np

from meteor_jax.config import suggest
from meteor_jax.data import sources
from meteor_jax.data.templates import (
    Conversation,
    Rendered,
    Template,
    get_template,
    render,
    render_turn,
    with_images,
)
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.types import IGNORE_LABEL, Batch

Kind = Literal["caption", "questions"]
Record = Mapping[str, Any]
SKIPPED_ID = -1  # the example_id of a row that could not be read; sum `example_id < 0` to count

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, and how it is laid out.

    Fields:
        sources: names of data sources, mixed by `weights` (equal where empty).
        num_images: images of each source's training split; empty, or None for one, takes all.
        image_size: pixels a side. text_length: T, an image counts as one token.
        questions_per_image: turns at most in a training conversation.
        tokenizer: "byte", "bpe:SIZE" or a folder. template: see `templates.TEMPLATES`.
        caption_question: what asks for a caption, in templates that keep the question.
        num_workers: processes that prepare batches (absl flags must be parsed, and the launcher
            have a `__main__` guard); 0 prepares them in threads.
        prefetch: batches prepared ahead (by each worker).
        seed: of the order of examples and questions. source_seed: of generated pictures.
        kept_records: encoded records that stay in memory once read (in each worker), which
            halves the time that later epochs take; 0 keeps none.
        data_dir: where sources keep their files.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...] = ()
    num_images: tuple[int | None, ...] = ()
    image_size: int = 64
    text_length: int = 256
    questions_per_image: int = 8
    max_images: int = 1
    tokenizer: str = "byte"
    template: str = "qa"
    caption_question: str = "Describe the image."
    seed: int = 0
    source_seed: int = 0
    num_workers: int = 0
    prefetch: int = 4
    kept_records: int = 16384
    data_dir: str = "~/tensorflow_datasets"

    def __post_init__(self):
        get_template(self.template)
        if not self.sources:
            raise ValueError("sources: expected at least one name.")
        for name in ("weights", "num_images"):
            given = getattr(self, name)
            if given and len(given) != len(self.sources):
                raise ValueError(
                    f"{name}: expected one for each of {len(self.sources)} sources, "
                    f"got {len(given)}."
                )
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(f"weights: expected positive numbers, got {self.weights}.")
        for name in ("image_size", "text_length", "questions_per_image", "max_images", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True)
class Example:
    """One row before it is padded: `images` are uint8[H, W, 3], lists hold at most T ids."""

    images: tuple[np.ndarray, ...]
    tokens: list[int]
    labels: list[int]
    example_id: int


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Questions as a model takes them: tokens int32[B, T], text_valid bool[B, T]."""

    tokens: np.ndarray
    text_valid: np.ndarray


class NothingFits(ValueError):
    """An example without a turn that fits the text length. The message is one line."""


def open_sources(config: DataConfig, *, split: str = "train") -> list[Sequence[Record]]:
    """The records of every source of the config, built where they do not exist yet."""
    counts = config.num_images if split == "train" else ()
    counts = counts or (None,) * len(config.sources)
    return [
        sources.open_source(
            name, split=split, data_dir=config.data_dir, num_images=count, seed=config.source_seed
        )
        for name, count in zip(config.sources, counts, strict=True)
    ]


def training_texts(records: Sequence[Sequence[Record]], *, limit: int = 2000) -> Iterator[str]:
    """Questions with their answers, and captions, of the first `limit` records of each source."""
    for source in records:
        for index in range(min(limit, len(source))):
            record = source[index]
            for item in record["qa"]:
                yield f"{item['question']}: {item['answer']}"
            yield record["caption"]


def make_train_iterator(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    kind: Kind,
    batch_size: int,
    template: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    records: Sequence[Sequence[Record]] | None = None,
) -> grain.DatasetIterator:
    """An endless iterator of `Batch`es of NumPy arrays, reshuffled every epoch.

    What it gives depends on the config and the position only: the processes' batches together
    are the same examples however many processes there are. `get_state` and `set_state` resume it
    exactly; `grain.checkpoint.CheckpointSave` puts the state into an Orbax checkpoint.

    An example that cannot be read or that does not fit becomes a row with example_id
    `SKIPPED_ID`, no image, every label ignored and one valid pad token (so that attention has
    something to look at), and its error is logged in one line.

    Args:
        kind: "caption" or "questions": a conversation of up to `questions_per_image` turns,
            chosen and ordered anew every epoch; turns that do not fit whole are left out.
        batch_size: rows of this process.
        template: of this stage; the config's where None.
        records: the sources, opened; the config's training splits where None.

    Raises:
        ValueError: an unknown kind or template, or questions in a template that drops them.
    """
    layout = get_template(template or config.template)
    if kind not in get_args(Kind):
        raise ValueError(f"kind: no such kind '{kind}'.{suggest(kind, get_args(Kind))}")
    if kind == "questions" and not layout.keeps_question:
        raise ValueError(
            f"template: '{template or config.template}' drops questions, use it for captions only."
        )
    records = open_sources(config) if records is None else records
    # grain looks into whatever passes through it, so only indices do until the example is made.
    ends = [0, *itertools.accumulate(len(source) for source in records)]
    streams = [
        grain.MapDataset.range(start, stop).seed(config.seed + index).shuffle().repeat()
        for index, (start, stop) in enumerate(itertools.pairwise(ends))
    ]
    reader = _RecordReader(tuple(records), config.kept_records)
    make_example = _MakeExample(config, tokenizer, layout, kind, reader)
    batches = (
        grain.MapDataset.mix(streams, config.weights or None)
        .random_map(make_example, seed=config.seed)[process_index::process_count]
        .batch(batch_size, drop_remainder=True, batch_fn=_Collate(config, tokenizer.pad_id))
        .to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(2, config.prefetch))
        )
    )
    if config.num_workers:
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.num_workers, per_worker_buffer_size=config.prefetch
            )
        )
    return iter(batches)


def pack_questions(
    pairs: Sequence[tuple[str, str]],
    *,
    num_images: int,
    max_turns: int,
    template: Template,
    tokenizer: Tokenizer,
    text_length: int,
) -> Rendered:
    """A conversation of the first `max_turns` of `pairs` that fit whole, in their order.

    Raises:
        NothingFits: not even one does.
    """
    if not pairs:
        raise NothingFits("it has no questions.")
    tokens, labels, shortest, turns = [], [], None, 0
    for question, answer in pairs:
        if turns == 0:
            question = with_images(question, num_images, template=template)
        turn = render_turn(
            question, answer, first=turns == 0, template=template, tokenizer=tokenizer
        )
        length = len(turn.tokens)
        if len(tokens) + length <= text_length:
            tokens, labels, turns = tokens + turn.tokens, labels + turn.labels, turns + 1
        elif turns == 0:
            shortest = length if shortest is None else min(shortest, length)
        if turns == max_turns:
            break
    if not turns:
        raise NothingFits(
            f"the shortest of {len(pairs)} questions with its answer takes {shortest} tokens, "
            f"text_length is {text_length}; raise text_length or shorten the answers."
        )
    return Rendered(tokens, labels)


def collate(
    examples: Sequence[Example], *, max_images: int, image_size: int, text_length: int, pad_id: int
) -> Batch:
    """Pads examples of 0 to `max_images` images to one `Batch` of NumPy arrays.

    Raises:
        ValueError: an example with more images or more tokens than there is room for, or whose
            image tokens are not as many as its images.
    """
    rows = len(examples)
    images = np.zeros((rows, max_images, image_size, image_size, 3), np.uint8)
    image_valid = np.zeros((rows, max_images), bool)
    labels = np.full((rows, text_length), IGNORE_LABEL, np.int32)
    for row, example in enumerate(examples):
        num_images = Rendered(example.tokens, example.labels).num_images
        if num_images != len(example.images) or num_images > max_images:
            raise ValueError(
                f"example {example.example_id}: {num_images} image tokens and "
                f"{len(example.images)} images; expected as many of both, at most {max_images}."
            )
        if num_images:
            images[row, :num_images] = example.images
            image_valid[row, :num_images] = True
        labels[row, : len(example.labels)] = example.labels[:text_length]
    tokens, text_valid = _pad_rows(
        [example.tokens for example in examples],
        text_length=text_length,
        pad_id=pad_id,
        what=[f"example {example.example_id}" for example in examples],
    )
    return Batch(
        images=images,
        image_valid=image_valid,
        tokens=tokens,
        text_valid=text_valid,
        labels=labels,
        example_id=np.array([example.example_id for example in examples], np.int32),
    )


def collate_prompts(
    questions: Sequence[str],
    *,
    tokenizer: Tokenizer,
    template: str,
    text_length: int,
    batch_size: int,
    num_images: int = 1,
) -> Prompts:
    """Each question alone about its `num_images` images, ready to be answered.

    Rows are padded on the right; rows past the questions repeat the last one, so that a batch
    always has `batch_size` rows.

    Raises:
        ValueError: no questions or more than `batch_size`, or a prompt longer than `text_length`.
    """
    if not 0 < len(questions) <= batch_size:
        raise ValueError(f"prompts: expected 1 to {batch_size} questions, got {len(questions)}.")
    layout = get_template(template)
    rows = [
        render(
            Conversation(((with_images(question, num_images, template=layout), None),)),
            template=layout,
            tokenizer=tokenizer,
        ).tokens
        for question in questions
    ]
    rows += [rows[-1]] * (batch_size - len(rows))
    names = [f"prompt '{question[:40]}'" for question in questions]
    names += [names[-1]] * (batch_size - len(names))
    return Prompts(*_pad_rows(rows, text_length=text_length, pad_id=tokenizer.pad_id, what=names))


def _pad_rows(
    rows: Sequence[list[int]], *, text_length: int, pad_id: int, what: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((len(rows), text_length), pad_id, np.int32)
    text_valid = np.zeros((len(rows), text_length), bool)
    for index, row in enumerate(rows):
        if len(row) > text_length:
            raise ValueError(
                f"{what[index]} takes {len(row)} tokens, text_length is {text_length}; "
                "raise text_length."
            )
        tokens[index, : len(row)] = row
        text_valid[index, : len(row)] = True
    return tokens, text_valid


@dataclasses.dataclass(frozen=True)
class _RecordReader:
    """All sources one after the other; the first `limit` records that are read stay in memory."""

    sources: tuple[Sequence[Record], ...]
    limit: int
    kept: dict[int, Record] = dataclasses.field(default_factory=dict)

    def read(self, index: int) -> Record:
        if index in self.kept:
            return self.kept[index]
        within = index
        for source in self.sources:
            if within < len(source):
                record = source[within]
                if len(self.kept) < self.limit:
                    self.kept[index] = record
                return record
            within -= len(source)
        raise IndexError(f"no record {index} past the last source.")


@dataclasses.dataclass(frozen=True)
class _MakeExample:
    """The n-th record of all sources to an `Example`; a class, so that workers can unpickle it."""

    config: DataConfig
    tokenizer: Tokenizer
    template: Template
    kind: Kind
    reader: _RecordReader

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        record = self.reader.read(index)
        try:
            image = sources.decode_image(record["image"], size=self.config.image_size)
            text = self._text(record, rng)
        except (sources.CorruptImage, NothingFits) as error:
            logger.error("example %d skipped: %s", record["image_id"], error)
            return Example((), [self.tokenizer.pad_id], [IGNORE_LABEL], SKIPPED_ID)
        return Example((image,), text.tokens, text.labels, record["image_id"])

    def _text(self, record: Record, rng: np.random.Generator) -> Rendered:
        if self.kind == "caption":
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
        )


@dataclasses.dataclass(frozen=True)
class _Collate:
    config: DataConfig
    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        return collate(
            examples,
            max_images=self.config.max_images,
            image_size=self.config.image_size,
            text_length=self.config.text_length,
            pad_id=self.pad_id,
        )
