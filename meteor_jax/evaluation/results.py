"""From answered questions to the rows of a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from meteor_jax.data.sources.registry import SOURCES
from meteor_jax.evaluation.metrics import METRICS, interval, paired_difference, yes_f1
from meteor_jax.evaluation.tasks.registry import Question, combined_name
from meteor_jax.evaluation.tasks.scoring.aggregate import AGGREGATIONS, Aggregate
from meteor_jax.evaluation.tasks.scoring.registry import SCORERS, SUBMISSION
from meteor_jax.experiment.plans import MAJORITY
from meteor_jax.inference.engine.request import Prediction

COMBINED = "combined"  # group of the rows that join a source's tasks

# TFLOPs of a question, as it was computed: of the places of its text, visual tokens computed after
# each prune step (a mean over questions that are alike in the rest), images that it has places for,
# and rows of its batch.
QuestionCost = Callable[[int, tuple[float, ...], int, int], float]


@dataclasses.dataclass(frozen=True)
class PlanResult:
    """One plan's predictions and their scores, in the order of the questions.

    Attributes:
        scores: in [0, 1]; 0 where an image could not be decoded.
        visual_tokens_fused: tokens of an image that enter the LLM.
        layers: the first layer after each prune step; depth: layers of the LLM.
        seconds: wall time a question, everything compiled before.
    """

    plan: str
    predictions: tuple[Prediction, ...]
    scores: tuple[float, ...]
    visual_tokens_fused: int = 0
    layers: tuple[int, ...] = ()
    depth: int = 1
    seconds: float = 0.0

    def select(self, members: Sequence[int]) -> PlanResult:
        """The result for some of the questions."""
        return dataclasses.replace(
            self,
            predictions=tuple(self.predictions[i] for i in members),
            scores=tuple(self.scores[i] for i in members),
        )


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table and of eval.json.

    Attributes:
        metric: how its questions were scored; "mean" where tasks of several metrics are joined.
        score: share of what `n` questions can reach; low, high: its 95 % interval, over questions
            or, where some count only together, over such units.
        group: the task's group, or "combined" for a source's tasks together.
        corrupt: questions scored 0 because their image could not be decoded.
        non_finite: questions with a logit that was NaN or infinite.
        visual_tokens_kept: visual tokens of a question, mean over the LLM's layers.
        visual_tokens_computed: those that its layers computed: the static sizes that the batches
            were packed into, a question's share.
        visual_tokens_fused: those of an image that enter the LLM.
        tflops: computed for one question with its images encoded for it alone, up to the first
            answer token.
        seconds: wall time of one question as it was run, images shared.
        f1: of "yes", for yes/no tasks.
        delta, delta_low, delta_high: score minus the reference plan's, unit by unit, and its 95 %
            interval; None for the reference itself.
        parts: further numbers by name, such as a subset's score or MME's points; see
            `tasks.scoring.aggregate`.
    """

    task: str
    plan: str
    metric: str
    score: float
    low: float
    high: float
    n: int
    group: str
    corrupt: int = 0
    non_finite: int = 0
    visual_tokens_kept: float = 0.0
    visual_tokens_computed: float = 0.0
    visual_tokens_fused: int = 0
    tflops: float = 0.0
    seconds: float = 0.0
    f1: float | None = None
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def difference(self) -> tuple[float, float, float] | None:
        """(delta, delta_low, delta_high); None for the reference plan."""
        if self.delta is None or self.delta_low is None or self.delta_high is None:
            return None
        return self.delta, self.delta_low, self.delta_high


def score_answer(question: Question, prediction: str) -> float:
    """The question's score under its task's metric, in [0, 1]."""
    metric = question.task.metric
    if metric in METRICS:
        return METRICS[metric](prediction, question.references)
    return SCORERS[metric](prediction, question.references, question.detail)


def majority(questions: Sequence[Question]) -> PlanResult:
    """Every question answered with its task's most frequent reference answer: chance."""
    references: dict[str, Counter] = {}
    for question in questions:
        references.setdefault(question.task.name, Counter())[question.answer] += 1
    best = {task: counts.most_common(1)[0][0] for task, counts in references.items()}
    texts = [best[question.task.name] for question in questions]
    return PlanResult(
        plan=MAJORITY,
        predictions=tuple(Prediction(text=text) for text in texts),
        scores=tuple(map(score_answer, questions, texts)),
    )


def layer_average(kept: Sequence[float], *, result: PlanResult) -> float:
    """Visual tokens of a question, averaged over the layers of the LLM."""
    bounds = (0, *result.layers, result.depth)
    sizes = (result.visual_tokens_fused, *kept)
    return sum(size * (bounds[i + 1] - bounds[i]) for i, size in enumerate(sizes)) / result.depth


def make_rows(
    questions: Sequence[Question],
    results: Sequence[PlanResult],
    *,
    tflops: Mapping[str, QuestionCost],
) -> list[Row]:
    """The rows of all plans: every task, and every source of several tasks as a whole.

    Args:
        results: the reference of the differences is the plan "full", or else the first.
        tflops: by plan; a plan without one costs 0.
    """
    subsets: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        if question.task.metric != SUBMISSION:
            subsets.setdefault(question.task.name, []).append(i)
    tasks = {question.task.name: question.task for question in questions}
    sources = Counter(task.source for task in tasks.values() if task.source in SOURCES)
    for source in (source for source, count in sources.items() if count > 1):
        subsets[combined_name(source)] = [
            i for i, question in enumerate(questions) if question.task.source == source
        ]
    reference = next((result for result in results if result.plan == "full"), results[0])
    rows = []
    for name, members in subsets.items():
        asked = [questions[i] for i in members]
        parts = [result.select(members) for result in results]
        base = _unit_scores(_summarise(name, asked, reference.select(members)))
        for result in parts:
            summary = _summarise(name, asked, result)
            row = _make_row(name, asked, result, summary=summary, tflops=tflops.get(result.plan))
            if result.plan != reference.plan and base:
                difference = paired_difference(_unit_scores(summary), base)
                row = dataclasses.replace(
                    row,
                    delta=difference.mean,
                    delta_low=difference.low,
                    delta_high=difference.high,
                )
            rows.append(row)
    return rows


def _summarise(name: str, questions: Sequence[Question], result: PlanResult) -> Aggregate:
    task = questions[0].task
    # Several tasks together are all scored by the plain mean.
    aggregation = AGGREGATIONS[task.aggregation if name == task.name else "mean"]
    texts = [found.text for found in result.predictions]
    return aggregation(questions, texts, list(result.scores))


def _unit_scores(summary: Aggregate) -> list[float]:
    return [unit.score for unit in summary.units]


def averages(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """By plan, the mean score over the tasks of every group, and over "all" tasks.

    Every task counts the same, however many questions it has.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.group != COMBINED:
            for group in (row.group, "all"):
                scores.setdefault(row.plan, {}).setdefault(group, []).append(row.score)
    return {
        plan: {group: float(np.mean(values)) for group, values in groups.items()}
        for plan, groups in scores.items()
    }


def _means(values: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(np.mean(values, axis=0).tolist()) if values else ()


def _num_places(found: Prediction) -> int:
    """Images that its row had places for: a question without one has those of one, empty."""
    return max(found.num_images, 1)


def _visual_tokens(
    after_steps: Sequence[Sequence[float]], num_images: Sequence[int], *, result: PlanResult
) -> float:
    """Mean over questions and layers, of visual tokens after each prune step and images before."""
    if not after_steps:
        return 0.0
    entering = dataclasses.replace(
        result, visual_tokens_fused=float(np.mean(num_images)) * result.visual_tokens_fused
    )
    return layer_average(_means(after_steps), result=entering)


def _mean_tflops(predictions: Sequence[Prediction], tflops: QuestionCost) -> float:
    """Mean over questions, each as in the batch that it was part of."""
    shapes: dict[tuple[int, int, int], list[tuple[float, ...]]] = {}
    for found in predictions:
        shape = found.prompt_length, _num_places(found), found.batch_rows
        shapes.setdefault(shape, []).append(found.computed)
    return sum(
        len(computed) * tflops(length, _means(computed), images, rows)
        for (length, images, rows), computed in shapes.items()
    ) / len(predictions)


def _make_row(
    name: str,
    questions: Sequence[Question],
    result: PlanResult,
    *,
    summary: Aggregate,
    tflops: QuestionCost | None,
) -> Row:
    scores, predictions = _unit_scores(summary), result.predictions
    low, high = interval(scores) if scores else (0.0, 1.0)
    asked = [found for found in predictions if not found.unreadable]
    metrics = {question.task.metric for question in questions}
    f1 = summary.parts.get("f1")
    if metrics == {"yes_no"}:
        f1 = yes_f1([found.text for found in predictions], [[q.answer] for q in questions])
    return Row(
        task=name,
        plan=result.plan,
        metric=metrics.pop() if len(metrics) == 1 else "mean",
        score=summary.score,
        low=low,
        high=high,
        n=len(predictions),
        group=questions[0].task.group if name == questions[0].task.name else COMBINED,
        corrupt=sum(found.unreadable for found in predictions),
        non_finite=sum(not found.finite for found in predictions),
        visual_tokens_kept=_visual_tokens(
            [found.kept for found in asked], [found.num_images for found in asked], result=result
        ),
        visual_tokens_computed=_visual_tokens(
            [found.computed for found in asked], list(map(_num_places, asked)), result=result
        ),
        visual_tokens_fused=result.visual_tokens_fused,
        tflops=_mean_tflops(asked, tflops) if tflops and asked else 0.0,
        seconds=result.seconds,
        f1=f1,
        parts=summary.parts,
    )
