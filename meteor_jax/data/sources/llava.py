"""Prepares a LLaVA JSON file and its image folder once, as array_record files.

A config then reads it as the source `llava:NAME`. Killed and started again, it goes on after the
last whole shard. Entries are shuffled, so that the last records of a file that was joined from
several sets are a sample of all of them (they are what `data.held_out` sets aside).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from meteor_jax.data.sources.conversations import (
    FAMILY,
    VERSION,
    MalformedEntry,
    features,
    parse_entry,
    prepared_folder,
)
from meteor_jax.data.sources.records import prepare
from meteor_jax.data.sources.registry import CorruptImage, check_image
from meteor_jax.progress import progress_bar

EXAMPLES_PER_SHARD = 1024
START_FILE, SUMMARY_FILE, SKIPPED_FILE = "start.json", "summary.json", "skipped.jsonl"
SHOWN = 10


class BadEntries(ValueError):
    """Some entries cannot be used. The message is one line, with the first of them."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An entry that is left out: its row in the JSON file, its id, and why."""

    row: int
    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of whole records."""

    path: Path
    num_examples: int
    num_text_only: int
    num_bytes: int
    skipped: tuple[Skipped, ...]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared data set; `num_skipped` entries are listed in its `skipped.jsonl`."""

    folder: Path
    num_examples: int
    num_text_only: int
    num_bytes: int
    num_shards: int
    num_skipped: int


def prepare_llava(
    json_path: str | Path,
    *,
    images: str | Path,
    name: str,
    data_dir: str | Path,
    skip_bad: bool = False,
    num_threads: int | None = None,
    examples_per_shard: int = EXAMPLES_PER_SHARD,
) -> Prepared:
    """Writes the data set `name` below `data_dir`; the images' bytes go in as they are.

    Every image is decoded once to see that it is whole. All entries are looked at before any
    complaint; a second call looks again only at shards in which something was wrong, and does
    nothing for a data set that is prepared.

    Args:
        json_path: a JSON list, or one entry a line in a file that ends in `.jsonl`.
        images: the folder that the paths in the file start from.
        skip_bad: leaves out what cannot be used, and lists it in `skipped.jsonl` beside the files.
        num_threads: that read and check images; by default one a core, at most 16.

    Raises:
        BadEntries: something cannot be used and `skip_bad` is not set.
        ValueError, FileNotFoundError: one line, for a file or folder that is not there or not a
            list, a name that is taken by another file, or nothing that can be used.
    """
    json_path, images = Path(json_path), Path(images)
    folder = prepared_folder(name, data_dir)
    unfinished = folder.parent / "unfinished"
    start = {"sha256": _sha256(json_path), "examples_per_shard": examples_per_shard}
    if folder.exists():
        _check_start(folder, start)
        return Prepared(folder=folder, **json.loads((folder / SUMMARY_FILE).read_text()))
    if not images.is_dir():
        raise FileNotFoundError(f"--images: {images} is not a folder.")
    entries = _read_entries(json_path)
    _check_start(unfinished, start)
    unfinished.mkdir(parents=True, exist_ok=True)
    (unfinished / START_FILE).write_text(json.dumps(start))

    order = np.random.default_rng(0).permutation(len(entries)).tolist()
    starts = range(0, len(order), examples_per_shard)
    shards = []
    serialize = _serializer()
    with (
        ThreadPoolExecutor(num_threads or min(16, os.cpu_count() or 1)) as pool,
        progress_bar() as bar,
    ):
        examples = bar.add_task(f"Preparing {FAMILY}:{name}", total=len(order))

        def load(row: int) -> dict[str, Any] | Skipped:
            return _load(entries[row], row=row, images=images)

        for index, first in enumerate(starts):
            rows = order[first : first + examples_per_shard]
            path = unfinished / f"shard-{index:05d}"
            shard = _read_shard(path)
            if shard is None or (shard.skipped and not skip_bad):
                shard = _write_shard(path, pool.map(load, rows), serialize=serialize)
            shards.append(shard)
            bar.advance(examples, len(rows))
    return _finish(folder, unfinished, shards, skip_bad=skip_bad)


def _finish(folder: Path, unfinished: Path, shards: Sequence[Shard], *, skip_bad: bool) -> Prepared:
    """Makes one data set of whole shards: it appears complete or not at all."""
    skipped = sorted(
        (item for shard in shards for item in shard.skipped), key=lambda item: item.row
    )
    listed = unfinished / SKIPPED_FILE
    listed.write_text("".join(json.dumps(dataclasses.asdict(item)) + "\n" for item in skipped))
    if skipped and not skip_bad:
        raise BadEntries(
            f"{len(skipped)} entries cannot be used: {_first(skipped)} All are in {listed}. "
            "Put them right, or leave them out with --skip_bad; only their shards are done again."
        )
    shards = [shard for shard in shards if shard.num_examples]
    if not shards:
        raise ValueError(f"nothing can be used: {_first(skipped)}")
    prepared = Prepared(
        folder=folder,
        num_examples=sum(shard.num_examples for shard in shards),
        num_text_only=sum(shard.num_text_only for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        num_shards=len(shards),
        num_skipped=len(skipped),
    )
    summary = dataclasses.asdict(prepared)
    del summary["folder"]
    (unfinished / SUMMARY_FILE).write_text(json.dumps(summary))
    config = LlavaConfig(name=folder.parent.name, shards=tuple(shards))
    prepare(Llava(config=config, data_dir=folder.parents[2]))
    shutil.rmtree(unfinished)
    return prepared


@dataclasses.dataclass
class LlavaConfig(tfds.core.BuilderConfig):
    """The data set's name, and its shards while it is prepared."""

    shards: tuple[Shard, ...] = dataclasses.field(default=(), repr=False)


class Llava(FileReaderBuilder, skip_registration=True):
    """Conversations about images, from a LLaVA JSON file."""

    name = FAMILY
    VERSION = tfds.core.Version(VERSION)
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features())

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        del dl_manager, download_config  # the shards are there, tfds writes what describes them
        shards = cast(LlavaConfig, self.builder_config).shards
        template = self._get_filename_template("train")
        for index, shard in enumerate(shards):
            os.replace(
                shard.path, template.sharded_filepath(shard_index=index, num_shards=len(shards))
            )
        for name in (START_FILE, SUMMARY_FILE, SKIPPED_FILE):
            shutil.copy(shards[0].path.with_name(name), self.data_dir)
        split = tfds.core.SplitInfo(
            name="train",
            shard_lengths=[shard.num_examples for shard in shards],
            num_bytes=sum(shard.num_bytes for shard in shards),
            filename_template=template,
        )
        self.info.set_splits(tfds.core.SplitDict([split]))


def _check_start(folder: Path, start: dict[str, Any]) -> None:
    path = folder / START_FILE
    if path.exists() and json.loads(path.read_text()) != start:
        raise ValueError(
            f"{folder} was made from another JSON file or with another shard size; remove it, or "
            "use another --name."
        )


def _read_entries(path: Path) -> list[Any]:
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                entries = [json.loads(line) for line in file if line.strip()]
            else:
                entries = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--json: {path} is not JSON: {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"--json: {path} holds no list of conversations.")
    return entries


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"--json: there is no file {path}.")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(entry: Any, *, row: int, images: Path) -> dict[str, Any] | Skipped:
    """A record, as `conversations.features` has it; images are read and checked."""
    try:
        parsed = parse_entry(entry)
        encoded = []
        for path in parsed.images:
            try:
                encoded.append((images / path).read_bytes())
            except (OSError, ValueError) as error:  # ValueError: a path that cannot be one
                reason = getattr(error, "strerror", None) or error
                raise CorruptImage(f"cannot read {path!r}: {reason}.") from error
            check_image(encoded[-1])
    except (MalformedEntry, CorruptImage) as error:
        name = str(entry.get("id", "")) if isinstance(entry, dict) else ""
        return Skipped(row, name, str(error))
    return {
        "id": parsed.name,
        "row": row,
        "images": encoded,
        "questions": [question for question, _ in parsed.turns],
        "answers": [answer for _, answer in parsed.turns],
    }


def _serializer() -> Any:
    fields = features()
    serializer = ExampleSerializer(fields.get_serialized_info())
    return lambda record: serializer.serialize_example(fields.encode_example(record))


def _write_shard(
    path: Path, loaded: Iterator[dict[str, Any] | Skipped], *, serialize: Any
) -> Shard:
    """Writes the records, then beside them what the file holds: only that makes it count."""
    partial = path.with_suffix(".partial")
    skipped, num_examples, num_text_only, num_bytes = [], 0, 0, 0
    with contextlib.closing(ArrayRecordWriter(str(partial), "group_size:1")) as writer:
        for record in loaded:
            if isinstance(record, Skipped):
                skipped.append(record)
                continue
            serialized = serialize(record)
            writer.write(serialized)
            num_examples += 1
            num_text_only += not record["images"]
            num_bytes += len(serialized)
    shard = Shard(path, num_examples, num_text_only, num_bytes, tuple(skipped))
    _replace(partial, path)
    summary = dataclasses.asdict(shard) | {"path": path.name}
    partial.write_text(json.dumps(summary))
    _replace(partial, path.with_suffix(".json"))
    return shard


def _read_shard(path: Path) -> Shard | None:
    summary = path.with_suffix(".json")
    if not (summary.exists() and path.exists()):
        return None
    fields = json.loads(summary.read_text())
    skipped = tuple(Skipped(**item) for item in fields["skipped"])
    return Shard(**fields | {"path": path, "skipped": skipped})


def _replace(partial: Path, path: Path) -> None:
    """Moves a file into place once the disk has it, so that no power cut leaves half of it."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _first(skipped: Sequence[Skipped]) -> str:
    shown = [f"entry {item.row} (id {item.name}): {item.reason}" for item in skipped[:SHOWN]]
    more = len(skipped) - len(shown)
    return " ".join(shown) + (f" … and {more} more." if more else "")
