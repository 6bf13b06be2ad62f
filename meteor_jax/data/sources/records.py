"""What one record of any source holds, and what a task is."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

Group = Literal["knowledge", "general", "reading", "ocr", "grounding"]
Record = Mapping[str, Any]


class Records(Protocol):
    """Random access to the records of one source: a data source of ours, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def __iter__(self) -> Iterator[Record]: ...


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One kind of question: where it comes from, which ability it asks for, how it is scored.

    Attributes:
        metric: how one answer is scored, a name in `evaluation.metrics.METRICS` or
            `evaluation.benchmarks.scoring.SCORERS`.
        max_new_tokens: where an answer is cut off; None leaves it to the evaluation's config.
        aggregation: from scores to the headline, a name in
            `evaluation.tasks.scoring.aggregate.AGGREGATIONS`.
        split: of the source that it asks.
    """

    name: str
    source: str
    group: Group
    metric: str
    max_new_tokens: int | None = None
    aggregation: str = "mean"
    split: str = "test"


def record_features() -> tfds.features.FeaturesDict:
    """One image with everything known about it: a full caption and all questions asked of it."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "image_id": np.int64,
            "qa": tfds.features.Sequence(
                {
                    "task": tfds.features.Text(),
                    "question": tfds.features.Text(),
                    "answer": tfds.features.Text(),
                    "question_id": np.int64,
                }
            ),
        }
    )


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset of such records. Subclasses say which splits there are and generate them."""

    VERSION = tfds.core.Version("1.0.0")
    # Where tfds looks for checksum files. Its own search imports importlib_resources, which it
    # does not require.
    code_path = epath.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, description=self.__doc__, features=record_features()
        )


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Writes the builder's files as array_record, where they are not there yet."""
    tfds.disable_progress_bar()  # the builders show one with a total, and so a time left
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads; there are none
            builder.download_and_prepare(file_format="array_record")
    finally:
        tfds.enable_progress_bar()
