"""Conversations about images in the LLaVA JSON format: one entry checked, stored, written as turns.

An entry is {"id": …, "image": a path, a list of them or nothing, "conversations": [{"from":
"human" or "gpt", "value": text}, …]}; `<image>` in a human turn says where an image stands.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from meteor_jax.data.templates import IMAGE_MARKER, Template, with_images

FAMILY = "llava"  # a source's name is llava:NAME
VERSION = "1.0.0"
SPEAKERS = ("human", "gpt")
Turns = tuple[tuple[str, str], ...]


class MalformedEntry(ValueError):
    """An entry that is not a conversation. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the file: its id, the paths of its images, its questions and answers."""

    name: str
    images: tuple[str, ...]
    turns: Turns


def parse_entry(entry: Any) -> Entry:
    """Checks an entry of the JSON file.

    What comes before the first human turn is dropped, as EAGLE does, and so is a last question
    without an answer. Nothing else is changed.

    Raises:
        MalformedEntry: no such fields, turns that do not alternate, text that cannot be written,
            or `<image>` in the questions, but not as often as there are images.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("conversations"), list):
        raise MalformedEntry("expected an object with a list 'conversations'.")
    images = entry.get("image") or ()
    images = (images,) if isinstance(images, str) else images
    if not isinstance(images, Sequence) or not all(isinstance(path, str) for path in images):
        raise MalformedEntry(f"'image' is a path or a list of them, got {entry['image']!r}.")
    turns = _pairs(entry["conversations"])
    markers = sum(question.count(IMAGE_MARKER) for question, _ in turns)
    if markers not in ({0, len(images)} if images else {0}):
        raise MalformedEntry(f"{markers} {IMAGE_MARKER} in the questions of {len(images)} images.")
    name = str(entry.get("id", ""))
    try:
        "".join([name, *itertools.chain(*turns)]).encode()
    except UnicodeEncodeError as error:
        raise MalformedEntry("its text is not valid Unicode.") from error
    return Entry(name, tuple(images), turns)


def _pairs(conversation: Sequence[Any]) -> Turns:
    said = []
    for turn in conversation:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise MalformedEntry("a turn is an object with texts 'from' and 'value'.")
        if said or turn.get("from") == "human":
            said.append((turn.get("from"), turn["value"]))
    for index, (speaker, _) in enumerate(said):
        if speaker != SPEAKERS[index % 2]:
            raise MalformedEntry(
                f"turn {index + 1} is from {speaker!r}, expected {SPEAKERS[index % 2]!r}."
            )
    said = said[: len(said) // 2 * 2]
    if not said:
        raise MalformedEntry("no human turn with an answer.")
    return tuple((said[i][1], said[i + 1][1]) for i in range(0, len(said), 2))


def place_images(turns: Turns, num_images: int, *, template: Template) -> Turns:
    """The turns with images where `template` has them, one `<image>` an image.

    A single image goes to the start of the turn that names it, as EAGLE does, or of the first
    turn. Several stay where the text has them (our reading; EAGLE trains on one), or go to the
    start of the first turn if it names none. A template that drops questions takes the first
    turn.
    """
    if not template.keeps_question:
        return ((IMAGE_MARKER * num_images, turns[0][1]),)
    named = [index for index, (question, _) in enumerate(turns) if IMAGE_MARKER in question]
    if not num_images or (named and num_images > 1):
        return turns
    first = named[0] if named else 0
    question, answer = turns[first]
    question = question.replace(IMAGE_MARKER, "").strip() if named else question
    moved = (with_images(question, num_images, template=template), answer)
    return (*turns[:first], moved, *turns[first + 1 :])


def features() -> tfds.features.FeaturesDict:
    """What a prepared data set holds; `images` are the files' own bytes."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "row": np.int64,
            "images": tfds.features.Sequence(tfds.features.Text()),
            "questions": tfds.features.Sequence(tfds.features.Text()),
            "answers": tfds.features.Sequence(tfds.features.Text()),
        }
    )


def prepared_folder(name: str, data_dir: str | Path) -> Path:
    """Where the data set `name` is kept, prepared or not.

    Raises:
        ValueError: a name that is no folder's name.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"--name: expected letters, digits, '_', '-' and '.', got '{name}'.")
    return Path(data_dir).expanduser() / FAMILY / name / VERSION


def open_prepared(
    name: str, *, data_dir: str | Path, num_examples: int | None = None
) -> ConversationSource:
    """Opens the data set `llava:NAME`, or one in a folder of that path.

    Args:
        num_examples: the first so many records; None takes all.

    Raises:
        ValueError: it is not prepared, with the command that does it; it holds something else; or
            it has fewer examples.
    """
    if name.startswith(f"{FAMILY}:"):
        folder = prepared_folder(name.removeprefix(f"{FAMILY}:"), data_dir)
        option = f"--name={name.removeprefix(f'{FAMILY}:')} --data_dir={data_dir}"
    else:
        folder, option = Path(name).expanduser(), "--name=NAME"
    if not (folder / "dataset_info.json").is_file():
        raise ValueError(
            f"source '{name}' is not prepared in {folder}; prepare it with: meteor prepare "
            f"--json=FILE --images=FOLDER {option}"
        )
    builder = tfds.builder_from_directory(folder)
    if set(builder.info.features or ()) != set(features()) or "train" not in builder.info.splits:
        raise ValueError(
            f"source '{name}': {folder} holds no conversations that `meteor prepare` wrote."
        )
    available = builder.info.splits["train"].num_examples
    if num_examples is not None and num_examples > available:
        raise ValueError(f"{name} has {available} examples; num_images asks {num_examples}.")
    split = "train" if num_examples is None else f"train[:{num_examples}]"
    records: Any = builder.as_data_source(split=split)  # ty: ignore[missing-argument]: a decorator
    return ConversationSource(name=name, records=records)


@dataclasses.dataclass(frozen=True)
class ConversationSource:
    """Random access to a prepared data set; picklable, so grain's workers can read it."""

    name: str
    records: Any  # a `tfds.data_source`

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`images` tuple of bytes, `turns` tuple of (question, answer), `image_id` its row in
        the JSON file."""
        record = self.records[range(len(self))[index]]
        texts = zip(record["questions"], record["answers"], strict=True)
        return {
            "images": tuple(record["images"]),
            "turns": tuple((question.decode(), answer.decode()) for question, answer in texts),
            "image_id": int(record["row"]),
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))
