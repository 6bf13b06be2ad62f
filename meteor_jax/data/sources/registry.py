"""The data sources by name: building them once, reading them at random, decoding their images.

A record is one image: `image` (encoded bytes, decoded by `decode_image` in the pipeline, so that a
corrupt one is met there), `caption`, `image_id` and `qa`, all questions asked of that image. Or it
is a conversation (`llava:NAME`): `images`, `turns` and `image_id`.
"""

from __future__ import annotations

import collections
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from meteor_jax.config import one_line, suggest
from meteor_jax.data.sources import easy_vqa, reading
from meteor_jax.data.sources.conversations import FAMILY, ConversationSource, open_prepared
from meteor_jax.data.sources.records import TaskSpec, prepare

TASKS: dict[str, TaskSpec] = {task.name: task for task in easy_vqa.TASKS + reading.TASKS}
SOURCES = (easy_vqa.SOURCE, reading.SOURCE)
SPLITS = ("train", "test")
PAD_COLOR = (122, 116, 104)  # CLIP's mean colour, which normalises to zero


class CorruptImage(ValueError):
    """Bytes that are not a whole image. The message is one line."""


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """Random access to one split's records; picklable, so grain's workers can read it."""

    name: str
    split: str
    records: Any  # a `tfds.data_source`, with the image left encoded

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image` bytes, `caption` str, `image_id` int, `qa` list of dicts of str and int."""
        record = self.records[range(len(self))[index]]
        qa = record["qa"]
        return {
            "image": record["image"],
            "caption": record["caption"].decode(),
            "image_id": int(record["image_id"]),
            "qa": [
                {
                    "task": task.decode(),
                    "question": question.decode(),
                    "answer": answer.decode(),
                    "question_id": int(question_id),
                }
                for task, question, answer, question_id in zip(
                    qa["task"], qa["question"], qa["answer"], qa["question_id"], strict=True
                )
            ],
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def open_source(
    name: str,
    *,
    split: str,
    data_dir: str | Path,
    num_images: int | None = None,
    seed: int = 0,
    canvas_side: int = reading.DEFAULT_SIDE,
) -> RecordSource | ConversationSource:
    """Opens a split, building it below `data_dir` where it is not there yet.

    Args:
        name: one of `SOURCES`; or `llava:NAME` or a folder's path, conversations that
            `meteor prepare` prepared, which have the split `train` only.
        split: `train` or `test`.
        data_dir: where datasets are kept between runs. Each is written under another name and
            moved into place when whole.
        num_images: how many images; for `easy-vqa` the first so many of the split (None: all),
            for `reading` the number that is generated (None: 20,000 / 1,500).
        seed: of the generated pictures; the published set ignores it.
        canvas_side: pixels, 96 to 128, of the generated pictures.

    Raises:
        ValueError: an unknown name or split, a number of images that there cannot be, or
            conversations that are not prepared.
    """
    prepared = name.startswith(f"{FAMILY}:") or "/" in name
    if not prepared and name not in SOURCES:
        raise ValueError(f"no data source '{name}'.{suggest(name, (*SOURCES, f'{FAMILY}:NAME'))}")
    splits = ("train",) if prepared else SPLITS
    if split not in splits:
        raise ValueError(f"no split '{split}' of '{name}'.{suggest(split, splits)}")
    if num_images is not None and num_images < 1:
        raise ValueError(f"{name}: num_images must be at least 1, got {num_images}.")
    if prepared:
        return open_prepared(name, data_dir=data_dir, num_examples=num_images)
    data_dir = Path(data_dir).expanduser()
    if name == reading.SOURCE:
        config = reading.ReadingConfig.make(
            split=split, num_images=num_images, seed=seed, canvas_side=canvas_side
        )
        builder, instruction = reading.Reading(config=config, data_dir=data_dir), split
    else:
        builder = easy_vqa.EasyVqa(data_dir=data_dir)
        instruction = split if num_images is None else f"{split}[:{num_images}]"
    prepare(builder)
    available = builder.info.splits[split].num_examples
    if num_images is not None and num_images > available:
        raise ValueError(f"{name} {split} has {available} images; num_images asks {num_images}.")
    records = builder.as_data_source(
        split=instruction, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return RecordSource(name=name, split=split, records=records)


def decode_image(encoded: bytes, *, size: int) -> np.ndarray:
    """uint8[size, size, 3]: padded to a square around the centre, then resized (bicubic).

    Raises:
        CorruptImage: the bytes are cut off, damaged, or no image at all.
    """
    return square_image(_open_image(encoded, load=lambda image: image.convert("RGB")), size=size)


def square_image(image: Image.Image, *, size: int) -> np.ndarray:
    """uint8[size, size, 3] of an RGB image: padded around the centre, then resized (bicubic)."""
    if image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), PAD_COLOR)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if image.width != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def check_image(encoded: bytes) -> None:
    """Reads an image to its end; a JPEG at an eighth of its size, which is faster.

    Raises:
        CorruptImage: the bytes are cut off, damaged, or no image at all.
    """

    def load(image: Image.Image) -> Image.Image:
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        return image

    _open_image(encoded, load=load)


def _open_image(encoded: bytes, *, load: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(io.BytesIO(encoded)) as check:
            check.verify()  # the checksums of a PNG; what follows would accept damaged pixels
        return load(Image.open(io.BytesIO(encoded)))
    except Exception as error:  # whatever a damaged file makes the library raise
        raise CorruptImage(
            f"cannot decode an image of {len(encoded)} bytes: {one_line(error)}"
        ) from error


def chance_level(task: str, source: RecordSource) -> float:
    """The share of a task's questions that its most frequent answer gets right."""
    answers = collections.Counter(
        item["answer"] for record in source for item in record["qa"] if item["task"] == task
    )
    if not answers:
        raise ValueError(f"no question of task '{task}' in {source.name} {source.split}.")
    return answers.most_common(1)[0][1] / answers.total()
