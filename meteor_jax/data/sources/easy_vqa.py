"""easy-VQA (github.com/vzhou842/easy-VQA, MIT licence): coloured shapes, 13 answers, its own split.

The pip package `easy-vqa` carries 4,000 training and 1,000 test images of 64×64 pixels. Captions
are ours: what an image's own questions and answers say about its shape and colour.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from pathlib import Path

import easy_vqa
import tensorflow_datasets as tfds

from meteor_jax.data.sources.records import RecordBuilder, TaskSpec
from meteor_jax.progress import track

SOURCE = "easy-vqa"
TASKS = (
    TaskSpec("easyvqa_attribute", SOURCE, "knowledge", "exact_match"),
    TaskSpec("easyvqa_yesno", SOURCE, "general", "yes_no"),
)
SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLORS = frozenset(easy_vqa.get_answers()) - SHAPES - {"yes", "no"}


class EasyVqa(RecordBuilder):
    """The package's images and questions as records; splits `train` and `test`."""

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # the package holds the files
        train = easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()
        test = easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()
        return {
            "train": self._generate_examples(*train, split="train"),
            "test": self._generate_examples(*test, split="test"),
        }

    def _generate_examples(
        self, paths: dict[int, str], questions: tuple, split: str
    ) -> Iterator[tuple[int, dict]]:
        asked = collections.defaultdict(list)
        for question_id, (question, answer, image_id) in enumerate(zip(*questions, strict=True)):
            task = "easyvqa_yesno" if answer in ("yes", "no") else "easyvqa_attribute"
            asked[image_id].append(
                {"task": task, "question": question, "answer": answer, "question_id": question_id}
            )
        for image_id in track(sorted(paths), f"Preparing {SOURCE} {split}"):
            qa = asked[image_id]
            yield (
                image_id,
                {
                    "image": Path(paths[image_id]).read_bytes(),
                    "caption": caption([(item["question"], item["answer"]) for item in qa]),
                    "image_id": image_id,
                    "qa": qa,
                },
            )


def caption(qa: Sequence[tuple[str, str]]) -> str:
    """'blue rectangle', or as much of it as the questions and answers of one image reveal.

    A question tells as much as its answer ('what color is the triangle?'), and so does the last
    possibility that was not denied. 'shape' stands where the shape stays unknown.
    """
    told, denied = set(), set()
    for question, answer in qa:
        words = question.rstrip("?").split()
        named = (SHAPES | COLORS).intersection(words)
        if answer not in ("yes", "no"):
            told |= named | {answer}
        elif (answer == "yes") != bool({"no", "not"}.intersection(words)):
            told |= named
        else:
            denied |= named
    colors, shapes = (_only(told, denied, options) for options in (COLORS, SHAPES))
    return " ".join(colors + (shapes or ["shape"]))


def _only(told: set[str], denied: set[str], options: frozenset[str]) -> list[str]:
    left = sorted(told & options) or sorted(options - denied)
    return left if len(left) == 1 else []
