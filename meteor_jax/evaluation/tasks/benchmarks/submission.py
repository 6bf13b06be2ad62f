"""Answers to test splits that only a server can score, in the files that the servers take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from meteor_jax.data.sources.records import TaskSpec
from meteor_jax.evaluation.tasks.scoring.registry import SUBMISSION
from meteor_jax.evaluation.tasks.scoring.vqa_accuracy import normalise, normalise_vqav2


class Asked(Protocol):
    """What a submission reads of a question."""

    @property
    def task(self) -> TaskSpec: ...

    @property
    def question_id(self) -> int | str: ...


def _vqav2(question_id: int | str, prediction: str) -> dict[str, Any]:
    return {"question_id": int(question_id), "answer": normalise_vqav2(prediction)}


def _vizwiz(question_id: int | str, prediction: str) -> dict[str, Any]:
    image = str(question_id).removesuffix(".jpg")
    return {"image": f"{image}.jpg", "answer": normalise(prediction)}


def _document(question_id: int | str, prediction: str) -> dict[str, Any]:
    return {"questionId": int(question_id), "answer": prediction}


ENTRIES: Mapping[str, Callable[[int | str, str], dict[str, Any]]] = {
    "vqav2_test": _vqav2,
    "vizwiz_vqa_test": _vizwiz,
    "docvqa_test": _document,
    "infovqa_test": _document,
}


def write_submissions(
    folder: Path, questions: Sequence[Asked], predictions: Sequence[str]
) -> list[Path]:
    """`<task>.json` in `folder` for every task that is to be submitted; returns their paths."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for question, prediction in zip(questions, predictions, strict=True):
        name = question.task.name
        if question.task.metric == SUBMISSION:
            entries.setdefault(name, []).append(ENTRIES[name](question.question_id, prediction))
    paths = []
    for name, of_task in entries.items():
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(of_task), encoding="utf-8")
    return paths
