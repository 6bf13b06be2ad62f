"""What one record of any source holds, and what a task is."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

Group = Literal["knowledge", "general", "reading"]
Metric = Literal["exact_match", "yes_no", "anls", "relaxed_accuracy"]


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One kind of question: where it comes from, which ability it asks for, how it is scored."""

    name: str
    source: str
    group: Group
    metric: Metric


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
