"""From the scores of a task's questions to its headline.

Every aggregation is `(questions, predictions, scores) -> Aggregate`. The headline is the mean over
units that are drawn as wholes: a question, or questions that count together. So an interval is one
over units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from meteor_jax.evaluation.tasks.scoring.text import pope_answer

MME_PAIR_MAX = 200  # points of an image: 100 for accuracy, 100 where both answers are right


class Asked(Protocol):
    """What an aggregation reads of a question."""

    @property
    def answer(self) -> str: ...

    @property
    def detail(self) -> Mapping[str, str]: ...


@dataclasses.dataclass(frozen=True)
class Unit:
    """Questions that count as one.

    Attributes:
        score: its part of the headline; the headline is the plain mean over units.
        members: indices of its questions.
    """

    score: float
    members: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """A task's result.

    Attributes:
        score: the headline, as a share of what can be reached.
        parts: further numbers by name, such as "points" or those of a subset.
    """

    score: float
    parts: dict[str, float]
    units: tuple[Unit, ...]


Aggregation = Callable[[Sequence[Asked], Sequence[str], Sequence[float]], Aggregate]


def mean(
    questions: Sequence[Asked], predictions: Sequence[str], scores: Sequence[float]
) -> Aggregate:
    """The mean over questions; where they have a "subset", the mean of each as well."""
    del predictions
    units = tuple(Unit(float(score), (i,)) for i, score in enumerate(scores))
    return _mean_of(units, _means_by(questions, scores, "subset"))


def pope(
    questions: Sequence[Asked], predictions: Sequence[str], scores: Sequence[float]
) -> Aggregate:
    """Accuracy, pooled over the subsets; parts hold precision, recall and F1 of "yes", and the
    share of "yes" among the answers, pooled and by subset.

    As in lmms-eval, recall leaves answers out that are neither yes nor no; `yes_ratio` is of the
    answers, where lmms-eval takes the reference ones.
    """
    rows = [
        (question.detail.get("subset", ""), pope_answer(question.answer), pope_answer(prediction))
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    parts = _yes_statistics([row[1:] for row in rows])
    subsets = list(dict.fromkeys(name for name, *_ in rows if name))
    means = _means_by(questions, scores, "subset")
    for subset in subsets:
        of_subset = _yes_statistics([row[1:] for row in rows if row[0] == subset])
        parts |= {f"{subset}/accuracy": means[subset]}
        parts |= {f"{subset}/{name}": value for name, value in of_subset.items()}
    return dataclasses.replace(mean(questions, predictions, scores), parts=parts)


def pairs(
    questions: Sequence[Asked], predictions: Sequence[str], scores: Sequence[float]
) -> Aggregate:
    """The share of pairs with both answers right; a question without its other is left out. MMVP.

    Parts: the mean over single questions.
    """
    del predictions
    units = tuple(
        Unit(float(all(scores[i] == 1 for i in members)), members)
        for members in _members(questions).values()
        if len(members) == 2
    )
    return _mean_of(units, {"questions": float(np.mean(scores))})


def circular(
    questions: Sequence[Asked], predictions: Sequence[str], scores: Sequence[float]
) -> Aggregate:
    """The share of questions that are right in every order of their options. MMBench.

    Parts: the mean over single orders, and the share of each ability.
    """
    del predictions
    units, parts = [], []
    for members in _members(questions).values():
        units.append(Unit(float(all(scores[i] == 1 for i in members)), members))
        parts.append(questions[members[0]])
    by_part = _means_by(parts, [unit.score for unit in units], "subset")
    return _mean_of(tuple(units), {"questions": float(np.mean(scores))} | by_part)


def mme(
    questions: Sequence[Asked], predictions: Sequence[str], scores: Sequence[float]
) -> Aggregate:
    """MME's points as a share of those that can be reached; an image counts with both its questions
    or not at all.

    An image has 100 points times its accuracy and 100 more if both answers are right; a category
    has the mean of its images, and the task the sum of its categories. Parts: "points" of the
    task, and of every category.
    """
    del predictions
    categories: dict[str, list[tuple[float, tuple[int, ...]]]] = {}
    for members in _members(questions).values():
        if len(members) == 2:
            right = [scores[i] for i in members]
            points = 100.0 * sum(right) / 2 + 100.0 * (sum(right) == 2)
            categories.setdefault(questions[members[0]].detail["subset"], []).append(
                (points, members)
            )
    parts = {
        name: sum(points for points, _ in images) / len(images)
        for name, images in categories.items()
    }
    num_units = sum(map(len, categories.values()))
    units = tuple(
        # Weighted so that the plain mean over units is the mean over categories.
        Unit(points / MME_PAIR_MAX * num_units / (len(categories) * len(images)), members)
        for images in categories.values()
        for points, members in images
    )
    total = sum(parts.values())
    share = total / (MME_PAIR_MAX * len(parts)) if parts else 0.0
    return Aggregate(score=share, parts={"points": total} | parts, units=units)


def points(
    questions: Sequence[Asked], predictions: Sequence[str], scores: Sequence[float]
) -> Aggregate:
    """The share of right answers; parts hold how many there are, in all ("points") and of every
    kind. OCRBench, whose 1,000 questions make "points" its score."""
    del predictions
    parts = {"points": float(sum(scores))}
    for question, score in zip(questions, scores, strict=True):
        kind = question.detail["subset"]
        parts[kind] = parts.get(kind, 0.0) + score
    units = tuple(Unit(float(score), (i,)) for i, score in enumerate(scores))
    return _mean_of(units, parts)


AGGREGATIONS: dict[str, Aggregation] = {
    "mean": mean, "pope": pope, "mmvp_pairs": pairs, "mmbench_circular": circular, "mme": mme,
    "ocrbench_sum": points,
}  # fmt: skip


def _mean_of(units: tuple[Unit, ...], parts: dict[str, float]) -> Aggregate:
    score = float(np.mean([unit.score for unit in units])) if units else 0.0
    return Aggregate(score=score, parts=parts, units=units)


def _members(questions: Sequence[Asked]) -> dict[str, tuple[int, ...]]:
    """Indices of the questions of every unit."""
    members: dict[str, tuple[int, ...]] = {}
    for i, question in enumerate(questions):
        unit = question.detail["group_id"]
        members[unit] = (*members.get(unit, ()), i)
    return members


def _means_by(questions: Sequence[Asked], scores: Sequence[float], name: str) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for question, score in zip(questions, scores, strict=True):
        if name in question.detail:
            groups.setdefault(question.detail[name], []).append(score)
    return {group: float(np.mean(values)) for group, values in groups.items()}


def _yes_statistics(rows: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Of pairs (reference, answer)."""
    hits = rows.count(("yes", "yes"))
    called = sum(answer == "yes" for _, answer in rows)
    wrong_yes, missed = rows.count(("no", "yes")), rows.count(("yes", "no"))
    precision = hits / (hits + wrong_yes) if hits + wrong_yes else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": called / len(rows) if rows else 0.0,
    }
