"""The benchmarks' metrics on cases that were worked out by hand; see tests/golden/metrics.json.

There, a case is a prediction, its golds, what else the metric takes, and the score.
"""

import json
from pathlib import Path

import pytest

from meteor_jax.evaluation.benchmarks import boxes, choice, evalai, mathvista, mmmu, text

CASES = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text("utf-8"))
PLAIN = {
    "vqa": evalai.vqa_accuracy, "vqav2": evalai.vqav2_accuracy,
    "exact_match_strict": text.exact_match_strict, "ai2d": text.ai2d, "pope": text.pope,
    "mme": text.mme, "anls_of_documents": text.anls_of_documents,
    "relaxed_chartqa": text.relaxed_chartqa, "mmmu_open": mmmu.open_question,
    "first_letter": choice.first_letter, "scienceqa": choice.scienceqa,
    "realworldqa": choice.realworldqa, "mmvp": choice.mmvp, "box_hit": boxes.box_hit,
}  # fmt: skip
WITH_CHOICES = {
    "mmbench_rules": choice.mmbench_rules, "mmbench_static": choice.mmbench_static,
    "mmmu_choice": mmmu.multiple_choice,
}  # fmt: skip
NORMALISERS = {"normalise": evalai.normalise, "normalise_vqav2": evalai.normalise_vqav2}


def cases(names):
    return [pytest.param(name, *case) for name in names for case in CASES[name]]


def test_every_metric_has_thirty_cases():
    assert set(CASES) == {*PLAIN, *WITH_CHOICES, *NORMALISERS, "ocrbench", "mathvista_rules"}
    assert min(map(len, CASES.values())) >= 30


@pytest.mark.parametrize(("name", "given", "normal"), cases(NORMALISERS))
def test_normalisers(name, given, normal):
    assert NORMALISERS[name](given) == normal


@pytest.mark.parametrize(("name", "prediction", "golds", "score"), cases(PLAIN))
def test_plain_metrics(name, prediction, golds, score):
    assert PLAIN[name](prediction, golds) == pytest.approx(score)


@pytest.mark.parametrize(("name", "prediction", "gold", "choices", "score"), cases(WITH_CHOICES))
def test_metrics_with_choices(name, prediction, gold, choices, score):
    assert WITH_CHOICES[name](prediction, [gold], choices=choices) == score


@pytest.mark.parametrize(("prediction", "golds", "dataset", "score"), CASES["ocrbench"])
def test_ocrbench(prediction, golds, dataset, score):
    assert text.ocrbench(prediction, golds, dataset=dataset) == score


@pytest.mark.parametrize(("prediction", "golds", "more", "score"), CASES["mathvista_rules"])
def test_mathvista(prediction, golds, more, score):
    assert mathvista.mathvista_rules(prediction, golds, **more) == score


def test_iou_by_hand():
    assert boxes.iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert boxes.iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert boxes.iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0


def test_a_box_is_read_as_it_was_written():
    box = (1 / 3, 2 / 7, 0.00001, 1.0)
    assert boxes.parse_box(boxes.format_box(box)) == box
