"""How many visual tokens the questions of a task kept: not only the mean, but how they spread."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from meteor_jax.evaluation.results import PlanResult, layer_average
from meteor_jax.evaluation.tasks.registry import Question

PERCENTILES = (5, 25, 50, 75, 95)
NUM_BINS = 10


def kept_tokens(
    questions: Sequence[Question], results: Sequence[PlanResult]
) -> dict[str, dict[str, Any]]:
    """By plan and task: a question's tokens, mean over the LLM's layers, and after each prune step.

    Plans without visual tokens, and questions whose image could not be decoded, are left out.
    """
    spread: dict[str, dict[str, Any]] = {}
    for result in results:
        if not result.visual_tokens_fused:
            continue
        fused, of_task = result.visual_tokens_fused, {}
        for question, found in zip(questions, result.predictions, strict=True):
            if not found.unreadable:
                entering = dataclasses.replace(result, visual_tokens_fused=fused * found.num_images)
                means, steps = of_task.setdefault(question.task.name, ([], []))
                means.append(layer_average(found.kept, result=entering))
                steps.append(found.kept)
        spread[result.plan] = {
            task: {
                "mean_over_layers": describe(means),
                "prune_steps": [describe(step) for step in zip(*steps, strict=True)],
            }
            for task, (means, steps) in of_task.items()
        }
    return spread


def describe(values: Sequence[float]) -> dict[str, Any]:
    """Mean, percentiles and a histogram: `edges` has one number more than `counts`."""
    counts, edges = np.histogram(values, bins=NUM_BINS if min(values) < max(values) else 1)
    return {
        "mean": float(np.mean(values)),
        "min": float(min(values)),
        "max": float(max(values)),
        "percentiles": dict(
            zip(map(str, PERCENTILES), np.percentile(values, PERCENTILES).tolist(), strict=True)
        ),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }
