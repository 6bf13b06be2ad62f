"""The benchmarks' metrics by name, each `(prediction, references, detail) -> float in [0, 1]`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from meteor_jax.evaluation.tasks.scoring import (
    boxes,
    mathvista,
    mmmu,
    multiple_choice,
    text,
    vqa_accuracy,
)

Detail = Mapping[str, str]
Score = Callable[[str, Sequence[str], Detail], float]

SUBMISSION = "submission"  # the metric of tasks whose answers only a server knows


def _plain(metric: Callable[[str, Sequence[str]], float]) -> Score:
    return lambda prediction, references, detail: metric(prediction, references)


def _mmbench(metric: Callable[..., float]) -> Score:
    return lambda prediction, references, detail: metric(
        prediction, references, choices=json.loads(detail["choices"])
    )


def _mmmu(prediction: str, references: Sequence[str], detail: Detail) -> float:
    if "choices" in detail:
        choices = json.loads(detail["choices"])
        return mmmu.multiple_choice(prediction, references, choices=choices)
    return mmmu.open_question(prediction, references)


def _mathvista(prediction: str, references: Sequence[str], detail: Detail) -> float:
    return mathvista.mathvista_rules(
        prediction,
        references,
        choices=json.loads(detail.get("choices", "[]")),
        answer_type=detail["answer_type"],
        precision=int(detail["precision"]),
    )


def _ocrbench(prediction: str, references: Sequence[str], detail: Detail) -> float:
    return text.ocrbench(prediction, references, dataset=detail["dataset"])


SCORERS: dict[str, Score] = {
    "scienceqa": _plain(multiple_choice.scienceqa),
    "ai2d": _plain(text.ai2d),
    "mmmu": _mmmu,
    "mathvista_rules": _mathvista,
    "mme": _plain(text.mme),
    "mmbench_rules": _mmbench(multiple_choice.mmbench_rules),
    "mmbench_static": _mmbench(multiple_choice.mmbench_static),
    "first_letter": _plain(multiple_choice.first_letter),
    "exact_match_strict": _plain(text.exact_match_strict),
    "pope": _plain(text.pope),
    "vqa": _plain(vqa_accuracy.vqa_accuracy),
    "vqav2": _plain(vqa_accuracy.vqav2_accuracy),
    "relaxed_chartqa": _plain(text.relaxed_chartqa),
    "anls_of_documents": _plain(text.anls_of_documents),
    "ocrbench": _ocrbench,
    "realworldqa": _plain(multiple_choice.realworldqa),
    "mmvp": _plain(multiple_choice.mmvp),
    "box_hit": _plain(boxes.box_hit),
    SUBMISSION: lambda prediction, references, detail: 0.0,
}
