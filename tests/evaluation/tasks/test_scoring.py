"""The benchmarks' metrics on cases that were worked out by hand; see tests/golden/metrics.json.

There, a case is a prediction, its references, what else the metric takes, and the score.
"""

import json
from pathlib import Path

import pytest

from meteor_jax.evaluation.tasks.scoring import (
    boxes,
    mathvista,
    mmmu,
    multiple_choice,
    text,
    vqa_accuracy,
)

CASES = json.loads((Path(__file__).parents[2] / "golden" / "metrics.json").read_text("utf-8"))
PLAIN = {
    "vqa": vqa_accuracy.vqa_accuracy, "vqav2": vqa_accuracy.vqav2_accuracy,
    "exact_match_strict": text.exact_match_strict, "ai2d": text.ai2d, "pope": text.pope,
    "mme": text.mme, "anls_of_documents": text.anls_of_documents,
    "relaxed_chartqa": text.relaxed_chartqa, "mmmu_open": mmmu.open_question,
    "first_letter": multiple_choice.first_letter, "scienceqa": multiple_choice.scienceqa,
    "realworldqa": multiple_choice.realworldqa, "mmvp": multiple_choice.mmvp,
    "box_hit": boxes.box_hit,
}  # fmt: skip
WITH_CHOICES = {
    "mmbench_rules": multiple_choice.mmbench_rules,
    "mmbench_static": multiple_choice.mmbench_static,
    "mmmu_choice": mmmu.multiple_choice,
}  # fmt: skip
NORMALISERS = {"normalise": vqa_accuracy.normalise, "normalise_vqav2": vqa_accuracy.normalise_vqav2}


def cases(names):
    return [pytest.param(name, *case) for name in names for case in CASES[name]]


def test_every_metric_has_thirty_cases():
    assert set(CASES) == {*PLAIN, *WITH_CHOICES, *NORMALISERS, "ocrbench", "mathvista_rules"}
    assert min(map(len, CASES.values())) >= 30


@pytest.mark.parametrize(("name", "given", "normal"), cases(NORMALISERS))
def test_normalisers(name, given, normal):
    assert NORMALISERS[name](given) == normal


@pytest.mark.parametrize(("name", "prediction", "references", "score"), cases(PLAIN))
def test_plain_metrics(name, prediction, references, score):
    assert PLAIN[name](prediction, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "choices", "score"), cases(WITH_CHOICES)
)
def test_metrics_with_choices(name, prediction, reference, choices, score):
    assert WITH_CHOICES[name](prediction, [reference], choices=choices) == score


@pytest.mark.parametrize(("prediction", "references", "dataset", "score"), CASES["ocrbench"])
def test_ocrbench(prediction, references, dataset, score):
    assert text.ocrbench(prediction, references, dataset=dataset) == score


@pytest.mark.parametrize(("prediction", "references", "more", "score"), CASES["mathvista_rules"])
def test_mathvista(prediction, references, more, score):
    assert mathvista.mathvista_rules(prediction, references, **more) == score


def test_iou_by_hand():
    assert boxes.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert boxes.iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert boxes.iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0


def test_a_box_is_read_as_it_was_written():
    box = (1 / 3, 2 / 7, 0.00001, 1.0)
    assert boxes.parse_box(boxes.format_box(box)) == box
