"""The benchmarks' metrics by name, each as `(prediction, golds, detail) -> float in [0, 1]`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from meteor_jax.evaluation.benchmarks import boxes, choice, evalai, mathvista, mmmu, text

Detail = Mapping[str, str]
Score = Callable[[str, Sequence[str], Detail], float]

SUBMISSION = "submission"  # the metric of tasks whose answers only a server knows


def _plain(metric: Callable[[str, Sequence[str]], float]) -> Score:
    return lambda prediction, golds, detail: metric(prediction, golds)


def _mmbench(metric: Callable[..., float]) -> Score:
    return lambda prediction, golds, detail: metric(
        prediction, golds, choices=json.loads(detail["choices"])
    )


def _mmmu(prediction: str, golds: Sequence[str], detail: Detail) -> float:
    if "choices" in detail:
        choices = json.loads(detail["choices"])
        return mmmu.multiple_choice(prediction, golds, choices=choices)
    return mmmu.open_question(prediction, golds)


def _mathvista(prediction: str, golds: Sequence[str], detail: Detail) -> float:
    return mathvista.mathvista_rules(
        prediction,
        golds,
        choices=json.loads(detail.get("choices", "[]")),
        answer_type=detail["answer_type"],
        precision=int(detail["precision"]),
    )


def _ocrbench(prediction: str, golds: Sequence[str], detail: Detail) -> float:
    return text.ocrbench(prediction, golds, dataset=detail["dataset"])


SCORERS: dict[str, Score] = {
    "scienceqa": _plain(choice.scienceqa),
    "ai2d": _plain(text.ai2d),
    "mmmu": _mmmu,
    "mathvista_rules": _mathvista,
    "mme": _plain(text.mme),
    "mmbench_rules": _mmbench(choice.mmbench_rules),
    "mmbench_static": _mmbench(choice.mmbench_static),
    "first_letter": _plain(choice.first_letter),
    "exact_match_strict": _plain(text.exact_match_strict),
    "pope": _plain(text.pope),
    "vqa": _plain(evalai.vqa_accuracy),
    "vqav2": _plain(evalai.vqav2_accuracy),
    "relaxed_chartqa": _plain(text.relaxed_chartqa),
    "anls_of_documents": _plain(text.anls_of_documents),
    "ocrbench": _ocrbench,
    "realworldqa": _plain(choice.realworldqa),
    "mmvp": _plain(choice.mmvp),
    "box_hit": _plain(boxes.box_hit),
    SUBMISSION: lambda prediction, golds, detail: 0.0,
}
