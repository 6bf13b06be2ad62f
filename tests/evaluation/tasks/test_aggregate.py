"""From scores to headlines, on cases that were worked out by hand."""

import dataclasses

import numpy as np
import pytest

from meteor_jax.evaluation.tasks.scoring.aggregate import AGGREGATIONS


@dataclasses.dataclass(frozen=True)
class Asked:
    answer: str = ""
    detail: dict = dataclasses.field(default_factory=dict)


def units_of(text):
    """ "11 0": a unit of two questions, both right, and one of one question, which is wrong."""
    questions, scores = [], []
    for number, unit in enumerate(text.split()):
        name, _, right = unit.rpartition(":")
        for digit in right:
            part = {"subset": name} if name else {}
            questions.append(Asked(detail={"group_id": f"{name}{number}"} | part))
            scores.append(float(digit))
    return questions, scores


def check_units(summary, questions):
    """The headline is the plain mean over units, and no question is in two of them."""
    if summary.units:
        assert np.mean([unit.score for unit in summary.units]) == pytest.approx(summary.score)
    members = [i for unit in summary.units for i in unit.members]
    assert len(set(members)) == len(members) <= len(questions)


@pytest.mark.parametrize(
    ("units", "score", "questions"),
    [
        ("1", 1, 1), ("0", 0, 0), ("1 0", 1 / 2, 1 / 2), ("1 1", 1, 1), ("0 0", 0, 0),
        ("11", 1, 1), ("10", 0, 1 / 2), ("01", 0, 1 / 2), ("00", 0, 0), ("11 10", 1 / 2, 3 / 4),
        ("11 1", 1, 1), ("10 1", 1 / 2, 2 / 3), ("11 0", 1 / 2, 2 / 3), ("1111", 1, 1),
        ("1110", 0, 3 / 4), ("0111", 0, 3 / 4), ("1111 1110", 1 / 2, 7 / 8),
        ("1111 0000", 1 / 2, 1 / 2), ("1111 1111", 1, 1), ("1110 1110", 0, 3 / 4),
        ("11 11 10", 2 / 3, 5 / 6),
        ("11 10 10", 1 / 3, 2 / 3), ("10 10 10", 0, 1 / 2), ("1 11 111 1111", 1, 1),
        ("0 11 111 1111", 3 / 4, 9 / 10), ("1 10 111 1111", 3 / 4, 9 / 10),
        ("1 11 110 1111", 3 / 4, 9 / 10), ("1 11 111 1110", 3 / 4, 9 / 10),
        ("1 10 110 1110", 1 / 4, 7 / 10), ("0 01 001 0001", 0, 3 / 10), ("111 000 1", 2 / 3, 4 / 7),
        ("1 1 1 0", 3 / 4, 3 / 4),
    ],
)  # fmt: skip
def test_mmbench_counts_a_question_in_all_its_orders(units, score, questions):
    asked, scores = units_of(units)
    summary = AGGREGATIONS["mmbench_circular"](asked, [""] * len(asked), scores)
    assert summary.score == pytest.approx(score)
    assert summary.parts["questions"] == pytest.approx(questions)
    check_units(summary, asked)


def test_orders_stand_anywhere_in_the_file():
    asked = [Asked(detail={"group_id": unit, "subset": part}) for unit, part in
             [("1", "ocr"), ("2", "ocr"), ("1", "ocr"), ("3", "count"), ("2", "ocr")]]  # fmt: skip
    summary = AGGREGATIONS["mmbench_circular"](asked, [""] * 5, [1.0, 1.0, 1.0, 0.0, 0.0])
    assert [unit.members for unit in summary.units] == [(0, 2), (1, 4), (3,)]
    assert summary.parts == pytest.approx({"questions": 3 / 5, "ocr": 1 / 2, "count": 0})


@pytest.mark.parametrize(
    ("units", "score"),
    [
        ("11", 1), ("10", 0), ("01", 0), ("00", 0), ("11 11", 1), ("11 10", 1 / 2),
        ("11 00", 1 / 2), ("10 01", 0), ("00 00", 0), ("11 11 00", 2 / 3), ("11 10 01", 1 / 3),
        ("11 01 11", 2 / 3),
        ("11 1", 1), ("10 1", 0), ("1", 0), ("0", 0), ("11 0", 1), ("1 1", 0), ("11 1 00", 1 / 2),
        ("11 11 11 11", 1), ("11 11 11 10", 3 / 4), ("11 11 10 10", 1 / 2), ("11 10 10 10", 1 / 4),
        ("10 10 10 10", 0), ("01 11 01 11", 1 / 2), ("00 11 11 11", 3 / 4), ("111 11", 1),
        ("11 11 11 11 01", 4 / 5), ("11 01 10 00 11", 2 / 5), ("00 01 10 11 1", 1 / 4),
    ],
)  # fmt: skip
def test_mmvp_counts_whole_pairs(units, score):
    asked, scores = units_of(units)
    summary = AGGREGATIONS["mmvp_pairs"](asked, [""] * len(asked), scores)
    assert summary.score == pytest.approx(score)
    assert summary.parts == {"questions": pytest.approx(np.mean(scores))}
    check_units(summary, asked)


@pytest.mark.parametrize(
    ("units", "points", "categories"),
    [
        ("OCR:11", 200, 1), ("OCR:10", 50, 1), ("OCR:01", 50, 1), ("OCR:00", 0, 1),
        ("OCR:11 OCR:11", 200, 1), ("OCR:11 OCR:10", 125, 1), ("OCR:11 OCR:00", 100, 1),
        ("OCR:10 OCR:10", 50, 1), ("OCR:10 OCR:00", 25, 1), ("OCR:00 OCR:00", 0, 1),
        ("OCR:11 count:11", 400, 2), ("OCR:11 count:10", 250, 2), ("OCR:11 count:00", 200, 2),
        ("OCR:10 count:10", 100, 2), ("OCR:00 count:00", 0, 2), ("OCR:10 count:01", 100, 2),
        ("OCR:11 OCR:11 count:00", 200, 2), ("OCR:11 OCR:00 count:11", 300, 2),
        ("OCR:11 OCR:10 count:10", 175, 2), ("OCR:11 OCR:11 OCR:10 count:10", 200, 2),
        ("OCR:11 OCR:11 OCR:11 count:11", 400, 2), ("OCR:11 count:11 color:11", 600, 3),
        ("OCR:11 count:10 color:00", 250, 3), ("OCR:10 count:10 color:10", 150, 3),
        ("OCR:11 count:11 color:10 color:00", 425, 3), ("OCR:11 OCR:1", 200, 1),
        ("OCR:1", 0, 0), ("OCR:11 count:1", 200, 1), ("OCR:10 OCR:0 count:11", 250, 2),
        ("OCR:11 OCR:11 OCR:00 OCR:00", 100, 1), ("OCR:11 OCR:10 OCR:10 OCR:00", 75, 1),
    ],
)  # fmt: skip
def test_mme_by_hand(units, points, categories):
    asked, scores = units_of(units)
    summary = AGGREGATIONS["mme"](asked, [""] * len(asked), scores)
    assert summary.parts["points"] == pytest.approx(points)
    assert len(summary.parts) == 1 + categories
    assert summary.score == pytest.approx(points / (200 * categories) if categories else 0)
    check_units(summary, asked)


GOLD = {"y": "yes", "n": "no"}
SAID = {"y": "Yes", "n": " no", "o": "maybe", "Y": "yes."}


@pytest.mark.parametrize(
    ("rows", "accuracy", "precision", "recall", "f1", "yes_ratio"),
    [  # a row: the reference answer and what is said
        ("yy", 1, 1, 1, 1, 1), ("nn", 1, 0, 0, 0, 0), ("yn", 0, 0, 0, 0, 0), ("ny", 0, 0, 0, 0, 1),
        ("yy nn", 1, 1, 1, 1, 1 / 2), ("yy yn", 1 / 2, 1, 1 / 2, 2 / 3, 1 / 2),
        ("yy ny", 1 / 2, 1 / 2, 1, 2 / 3, 1), ("yn ny", 0, 0, 0, 0, 1 / 2),
        ("nn ny", 1 / 2, 0, 0, 0, 1 / 2), ("yo", 0, 0, 0, 0, 0), ("no", 0, 0, 0, 0, 0),
        ("yY", 0, 0, 0, 0, 0), ("yy yo", 1 / 2, 1, 1, 1, 1 / 2), ("yy no", 1 / 2, 1, 1, 1, 1 / 2),
        ("yy yo yn", 1 / 3, 1, 1 / 2, 2 / 3, 1 / 3), ("nn yo", 1 / 2, 0, 0, 0, 0),
        ("yy yy yn nn", 3 / 4, 1, 2 / 3, 4 / 5, 1 / 2),
        ("yy yy ny nn", 3 / 4, 2 / 3, 1, 4 / 5, 3 / 4),
        ("yy yn ny nn", 1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2), ("yn yn nn nn", 1 / 2, 0, 0, 0, 0),
        ("yy yy yy yy", 1, 1, 1, 1, 1), ("ny ny ny ny", 0, 0, 0, 0, 1),
        ("nn nn nn nn", 1, 0, 0, 0, 0), ("yy yn yn yn", 1 / 4, 1, 1 / 4, 2 / 5, 1 / 4),
        ("yy ny ny ny", 1 / 4, 1 / 4, 1, 2 / 5, 1), ("yy nn nn nn", 1, 1, 1, 1, 1 / 4),
        ("yy yy yy yn ny nn", 4 / 6, 3 / 4, 3 / 4, 3 / 4, 4 / 6),
        ("yY yY yy nn", 1 / 2, 1, 1, 1, 1 / 4), ("yy yY ny nn", 1 / 2, 1 / 2, 1, 2 / 3, 1 / 2),
        ("yo yn no ny", 0, 0, 0, 0, 1 / 4), ("yy yy yn yn ny", 2 / 5, 2 / 3, 1 / 2, 4 / 7, 3 / 5),
    ],
)  # fmt: skip
def test_pope_by_hand(rows, accuracy, precision, recall, f1, yes_ratio):
    pairs = [(GOLD[row[0]], SAID[row[1]]) for row in rows.split()]
    asked = [Asked(answer=reference) for reference, _ in pairs]
    said = [answer for _, answer in pairs]
    scores = [float(reference == answer.strip().lower()) for reference, answer in pairs]
    summary = AGGREGATIONS["pope"](asked, said, scores)
    assert summary.score == pytest.approx(accuracy)
    expected = {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes_ratio}
    assert summary.parts == pytest.approx(expected)
    check_units(summary, asked)


def test_pope_has_its_subsets_and_all_pooled():
    subsets = ["random"] * 2 + ["popular"] * 2 + ["adversarial"] * 2
    asked = [Asked("yes" if i % 2 else "no", {"subset": name}) for i, name in enumerate(subsets)]
    said = ["no", "yes", "yes", "yes", "no", "no"]
    summary = AGGREGATIONS["pope"](asked, said, [1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    parts = summary.parts
    assert summary.score == pytest.approx(4 / 6)
    assert [parts[f"{name}/accuracy"] for name in dict.fromkeys(subsets)] == [1, 0.5, 0.5]
    assert [parts[f"{name}/f1"] for name in dict.fromkeys(subsets)] == pytest.approx([1, 2 / 3, 0])
    assert (parts["precision"], parts["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert parts["f1"] == pytest.approx(2 / 3)


def test_ocrbench_adds_up():
    kinds = ["Regular Text Recognition"] * 3 + ["Doc-oriented VQA"] * 2
    asked = [Asked(detail={"subset": kind}) for kind in kinds]
    summary = AGGREGATIONS["ocrbench_sum"](asked, [""] * 5, [1.0, 0.0, 1.0, 0.0, 1.0])
    assert summary.parts == {"points": 3, "Regular Text Recognition": 2, "Doc-oriented VQA": 1}
    assert summary.score == pytest.approx(3 / 5)
    check_units(summary, asked)


def test_a_mean_has_its_parts_where_questions_have_one():
    asked = [Asked(detail={"subset": "human"}), Asked(detail={"subset": "augmented"}), Asked()]
    summary = AGGREGATIONS["mean"](asked, [""] * 3, [1.0, 0.5, 0.0])
    assert summary.score == pytest.approx(0.5)
    assert summary.parts == {"human": 1, "augmented": 0.5}
    check_units(summary, asked)
