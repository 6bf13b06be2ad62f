"""Examples to batches: a grain pipeline of static shapes that resumes exactly."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

import grain
import numpy as np

from meteor_jax.config import suggest
from meteor_jax.data.config import Attention, DataConfig, Task
from meteor_jax.data.examples import Example, ExampleMaker, RecordReader
from meteor_jax.data.sources import registry as sources
from meteor_jax.data.sources.records import Record, Records
from meteor_jax.data.templates import (
    IMAGE_MARKER,
    Conversation,
    Rendered,
    get_template,
    render,
    with_images,
)
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.types import IGNORE_LABEL, Batch


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Questions as a model takes them: tokens int32[B, T], text_valid bool[B, T]."""

    tokens: np.ndarray
    text_valid: np.ndarray


def open_sources(config: DataConfig, *, split: str = "train") -> list[Records]:
    """The records of every source of the config, built where they do not exist yet."""
    counts = (split == "train" and config.num_images) or (None,) * len(config.sources)
    return [
        sources.open_source(
            name, split=split, data_dir=config.data_dir, num_images=count, seed=config.source_seed
        )
        for name, count in zip(config.sources, counts, strict=True)
    ]


def training_texts(records: Sequence[Records], *, limit: int = 2000) -> Iterator[str]:
    """Questions with their answers, and captions, of the first `limit` records of each source."""
    for source in records:
        for index in range(min(limit, len(source))):
            record = source[index]
            if "turns" in record:
                yield from (text for turn in record["turns"] for text in turn)
                continue
            for item in record["qa"]:
                yield f"{item['question']}: {item['answer']}"
            yield record["caption"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about one encoded image, and its answer."""

    question: str
    answer: str
    image: bytes


def questions_about_one_image(record: Record) -> list[Asked]:
    """Every question of a record; none if it has another number of images than one."""
    if "turns" not in record:
        image = record["image"]
        return [Asked(item["question"], item["answer"], image) for item in record["qa"]]
    if len(record["images"]) != 1:
        return []
    image = record["images"][0]
    return [
        Asked(question.replace(IMAGE_MARKER, "").strip(), answer, image)
        for question, answer in record["turns"]
    ]


def first_questions(
    records: Sequence[Records], *, count: int, of_image: int = 1, search: int | None = None
) -> list[Asked]:
    """Of each source, `of_image` questions about each of the first `count` images that have as
    many: the first one, and others drawn by a fixed seed.

    Looks through the first `search` records of a source (None: all), so that one which has no such
    image need not be read whole.
    """

    def asked(source: Records) -> Iterator[list[Asked]]:
        draw = random.Random(0)
        for record in itertools.islice(source, search):
            questions = questions_about_one_image(record)
            if len(questions) >= of_image:
                yield [questions[0], *draw.sample(questions[1:], of_image - 1)]

    return [
        question
        for source in records
        for questions in itertools.islice(asked(source), count)
        for question in questions
    ]


def make_train_iterator(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    task: Task,
    batch_size: int,
    template: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    records: Sequence[Records] | None = None,
    start_batch: int = 0,
) -> TrainIterator:
    """An endless iterator of `Batch`es of NumPy arrays, reshuffled every epoch.

    What it gives depends on the config and the position only: the processes' batches together
    are the same examples however many processes there are. `get_state` and `set_state` resume it
    exactly, on any number of processes and workers; `grain.checkpoint.CheckpointSave` puts the
    state into an Orbax checkpoint.

    An example that cannot be read or that does not fit becomes a row with example_id
    `SKIPPED_ID`, no image, every label ignored and one valid pad token (so that attention has
    something to look at), and its error is logged in one line.

    Conversations are cut at `text_length`, where an image counts as one token; a row whose image
    would be cut, or without an answer left, is skipped. (EAGLE cuts at 2,048 tokens of both.)

    Args:
        task: "captioning", or "instruction": a conversation of up to `questions_per_image` turns,
            chosen and ordered again every epoch; turns that do not fit whole are left out; or of
            "classification", one question whose answer is in `config.classes`. Sources of
            conversations give these as they stand for the first two.
        batch_size: rows of this process.
        template: of this stage; the config's where None.
        records: the sources, opened; the config's training splits where None.
        start_batch: begins there, as if so many batches had been taken.

    Raises:
        ValueError: an unknown task or template, questions in a template that drops them, a task
            that no source is for, or a source with nothing beside what is held out.
    """
    make_example = _example_maker(config, tokenizer, task, template, records)
    collate_rows = _collate_of(make_example)
    served = sources_for(config, task)
    # grain looks into whatever passes through it, so only indices do until the example is made.
    streams = []
    for index in served:
        rows = make_example.reader.training(index)
        stream = grain.MapDataset.range(rows.start, rows.stop).seed(config.seed + index)
        streams.append(stream.shuffle().repeat())
    weights = [config.weights[index] for index in served] if config.weights else None
    batches = (
        grain.MapDataset.mix(streams, weights)
        .random_map(make_example, seed=config.seed)[process_index::process_count]
        .batch(batch_size, drop_remainder=True, batch_fn=collate_rows)
    )
    return TrainIterator(
        batches, prefetch=config.prefetch, num_workers=config.num_workers, start=start_batch
    )


class TrainIterator(grain.DatasetIterator):
    """Batches prepared ahead, whose state is nothing but the number of the next one."""

    def __init__(
        self, batches: grain.MapDataset, *, prefetch: int, num_workers: int, start: int = 0
    ):
        super().__init__()
        self._batches, self._next = batches, start
        self._prefetch, self._num_workers = prefetch, num_workers
        self._iterator: grain.DatasetIterator | None = None  # opened when first asked

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._open()
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._stop()
        self._next = int(state["next_index"])

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def start_prefetch(self) -> None:
        if self._iterator is None:
            self._iterator = self._open()
            self._iterator.start_prefetch()

    def _open(self) -> grain.DatasetIterator:
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=max(2, self._prefetch))
        batches = self._batches[self._next :].to_iter_dataset(ahead)
        if self._num_workers:
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers, per_worker_buffer_size=self._prefetch
                )
            )
        return iter(batches)


def make_held_out_batches(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    task: Task,
    batch_size: int,
    template: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    records: Sequence[Records] | None = None,
) -> list[Batch]:
    """This process's rows of the `held_out` records of every source that is for `task`.

    Always the same rows, and with as many rows a step the same whole batches however many
    processes there are. The last batch is filled up with rows as skipped examples have them.

    Args:
        batch_size: rows of this process. The rest as in `make_train_iterator`, which raises the
            same.
    """
    make_example = _example_maker(config, tokenizer, task, template, records)
    collate_rows = _collate_of(make_example)
    served = sources_for(config, task)
    rows = [row for index in served for row in make_example.reader.held_out(index)]
    step, batches = batch_size * process_count, []
    for start in range(0, len(rows), step):
        mine = rows[start + process_index : start + step : process_count]
        examples = [make_example(row, np.random.default_rng([config.seed, row])) for row in mine]
        examples += [make_example.skipped()] * (batch_size - len(examples))
        batches.append(collate_rows(examples))
    return batches


def _example_maker(
    config: DataConfig,
    tokenizer: Tokenizer,
    task: Task,
    template: str | None,
    records: Sequence[Records] | None,
) -> ExampleMaker:
    name = template or config.template
    layout = get_template(name)
    if task not in get_args(Task):
        raise ValueError(f"task: no such task '{task}'.{suggest(task, get_args(Task))}")
    if task == "classification" and not config.classes:
        raise ValueError("classes: expected the answers that are told apart, got none.")
    if task != "captioning" and not layout.keeps_question:
        raise ValueError(f"template: '{name}' drops questions, use it for captions only.")
    config = dataclasses.replace(config, attention=config.attention_of(task))
    reader = RecordReader(config, tuple(open_sources(config) if records is None else records))
    return ExampleMaker(config, tokenizer, layout, task, reader)


def sources_for(config: DataConfig, task: Task) -> list[int]:
    """The numbers of the sources for a task."""
    tasks = config.tasks or ("any",) * len(config.sources)
    found = [index for index, name in enumerate(tasks) if name in (task, "any")]
    if not found:
        raise ValueError(f"tasks: no source is for '{task}', they are for {', '.join(tasks)}.")
    return found


def collate(
    examples: Sequence[Example],
    *,
    max_images: int,
    image_size: int,
    text_length: int,
    pad_id: int,
    attention: Attention = "causal",
    with_targets: bool = False,
) -> Batch:
    """Pads examples of 0 to `max_images` images to one `Batch` of NumPy arrays.

    With attention "independent_qa" the batch has `segment_ids`; an example that has none is one
    conversation.

    Raises:
        ValueError: an example with more images or more tokens than there is room for, or whose
            image tokens are not as many as its images.
    """
    rows = len(examples)
    images = np.zeros((rows, max_images, image_size, image_size, 3), np.uint8)
    image_valid = np.zeros((rows, max_images), bool)
    labels = np.full((rows, text_length), IGNORE_LABEL, np.int32)
    segment_ids = np.zeros((rows, text_length), np.int32)
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
        if example.segment_ids is not None:
            segment_ids[row, : len(example.segment_ids)] = example.segment_ids[:text_length]
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
        segment_ids=segment_ids if attention == "independent_qa" else None,
        target=np.array([e.target for e in examples], np.int32) if with_targets else None,
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


def _collate_of(make_example: ExampleMaker) -> Callable[[Sequence[Example]], Batch]:
    config = make_example.config
    return functools.partial(
        collate,
        max_images=config.max_images,
        image_size=config.image_size,
        text_length=config.text_length,
        pad_id=make_example.tokenizer.pad_id,
        attention=config.attention,
        with_targets=make_example.task == "classification",
    )
