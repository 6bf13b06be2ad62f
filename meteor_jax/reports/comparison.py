"""Comparisons between runs: question by question, over repeated trainings, and with the paper.

For models that were trained separately, each with the plan it is evaluated under: every run has its
own eval.json, none has both sides of the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from meteor_jax.evaluation.metrics import Estimate, mean_estimate, paired_difference
from meteor_jax.reports import paper
from meteor_jax.reports.page import ABSENT, Section, Table
from meteor_jax.reports.runs import Run, percent_of

Scores = Mapping[str, Mapping[str, float]]  # by task and question


def paired_comparison(runs: Sequence[Run]) -> Section | None:
    """Each plan's mean scores, and its difference from the reference: the first run's "full", or
    its first plan where it has no "full", which is a baseline only where it has no other.

    The difference is the mean over the tasks, each over the questions that both were asked; its
    95 % interval combines those of the tasks as independent. None for a single run, and where no
    predictions exist for the reference.
    """
    first = runs[0]
    reference = _reference(first)
    base = _scores(first, reference)
    if len(runs) == 1 or not base:
        return None
    groups = [group for run in runs for means in run.averages.values() for group in means]
    groups = [*dict.fromkeys(group for group in groups if group != "all"), "all"]
    rows = []
    for run in runs:
        for plan in run.model_plans:
            means = run.averages[plan]
            difference = [ABSENT] * 3
            if run is not first or plan != reference:
                change, asked = mean_difference(_scores(run, plan), base)
                if change is not None:
                    difference = [
                        f"{100 * change.mean:+.1f}",
                        f"{100 * change.low:+.1f} … {100 * change.high:+.1f}",
                        f"{asked:,}",
                    ]
            rows.append(
                [
                    run.label(plan),
                    f"{run.tokens_kept(plan):.1f}",
                    f"{run.tokens_computed(plan):.1f}",
                    *(f"{100 * means[g]:.1f}" if g in means else ABSENT for g in groups),
                    *difference,
                ]
            )
    header = ["plan", "kept", "computed", *groups, "difference", "95 % interval", "questions"]
    text = (
        "Percent, mean over the tasks of a group and over all tasks. Kept and computed are visual "
        "tokens per question, averaged over the LLM's layers. The difference compares the same "
        "questions, in percentage points, mean over the tasks."
    )
    return Section(f"Paired comparison with {first.label(reference)}", [text, Table(header, rows)])


def seed_variance(runs: Sequence[Run]) -> Section | None:
    """Plans that several runs have, as trainings with different seeds do: mean and standard
    deviation over the runs, and the difference of the mean from that of the reference plan.

    Only runs with the first run's tasks count, and of runs with equal parameters only the first.
    None where no plan is in two runs, or the first run has only baselines.
    """
    reference = _reference(runs[0])
    by_plan: dict[str, list[dict[str, float]]] = {}
    seen: set[tuple[str, str]] = set()  # plan and parameters: evaluated twice is trained once
    for run in runs:
        means, params = run.averages, run.content.get("params", run.name)
        for plan in run.model_plans if set(run.tasks) == set(runs[0].tasks) else ():
            if (plan, params) not in seen:
                by_plan.setdefault(plan, []).append(means[plan])
            seen.add((plan, params))
    repeated = {plan: means for plan, means in by_plan.items() if len(means) > 1}
    if not repeated or reference not in by_plan:
        return None
    groups = [*(group for group in by_plan[reference][0] if group != "all"), "all"]
    base = np.mean([means["all"] for means in by_plan[reference]])
    rows = []
    for plan, means in repeated.items():
        by_group = 100 * np.array([[run[group] for group in groups] for run in means])
        spread = zip(by_group.mean(0), by_group.std(0, ddof=1), strict=True)
        change = f"{by_group[:, -1].mean() - 100 * base:+.1f}"
        rows.append(
            [
                plan,
                str(len(means)),
                *(f"{mean:.1f} ± {deviation:.1f}" for mean, deviation in spread),
                ABSENT if plan == reference else change,
            ]
        )
    text = (
        "Percent, mean over the tasks of a group, then over the runs, ± standard deviation over "
        "the runs. The last column is the difference of the means, in percentage points."
    )
    header = ["plan", "runs", *groups, f"versus {reference}"]
    return Section("Variance across seeds", [text, Table(header, rows)])


def paper_comparison(runs: Sequence[Run]) -> Section:
    """The paper's table, and the runs' plans in its columns."""
    unpruned = paper.ROWS[0]
    rows = [
        [
            f"{name} (paper)",
            str(tokens),
            ABSENT,
            percent_of(tokens, unpruned[1]),
            f"{tflops:.2f}",
            percent_of(tflops, unpruned[2]),
            f"{mean:.1f}",
            ABSENT if name == unpruned[0] else f"{mean - unpruned[-1]:+.1f}",
            *map(str, scores),
        ]
        for name, tokens, tflops, *scores, mean in paper.ROWS
    ]
    for run in runs:
        named = [paper.task_of(benchmark, run.task_names) for benchmark in paper.BENCHMARKS]
        full = run.full_score
        for plan in run.model_plans:
            by_task = run.by_task(plan)
            score, tflops = run.mean_score(plan), run.mean(plan, "tflops")
            rows.append(
                [
                    run.label(plan),
                    f"{run.tokens_kept(plan):.1f}",
                    f"{run.tokens_computed(plan):.1f}",
                    percent_of(run.tokens_computed(plan), run.tokens_computed("full")),
                    np.format_float_positional(tflops, precision=3, fractional=False),
                    percent_of(tflops, run.mean("full", "tflops")),
                    f"{score:.1f}",
                    ABSENT if full is None or plan == "full" else f"{score - full:+.1f}",
                    *(f"{100 * by_task[t].score:.1f}" if t in by_task else ABSENT for t in named),
                ]
            )
    header = ["method", "kept", "computed", "tokens / full", "TFLOPs", "TFLOPs / full", "mean"]
    header += ["versus full", *paper.BENCHMARKS]
    text = (
        "Rows marked (paper) are a reference and were not measured here: full-size models, other "
        "data (Vicuna-7B, 1.8M fine-tuning examples). The paper's mean is over 11 benchmarks, and "
        "OCRBench is out of 1000. Our scores are percent, and our mean is over the tasks above. "
        "Comparable are the shares of tokens and TFLOPs, and the change from full."
    )
    return Section(
        "Comparison with the paper",
        [text, Table(header, rows)],
    )


def mean_difference(scores: Scores, base: Scores) -> tuple[Estimate | None, int]:
    """How much better `scores` are than `base`, mean over the tasks, and over how many questions.

    None where the two have different tasks, or no question of a task in common.
    """
    common = {task: base[task].keys() & scores.get(task, {}).keys() for task in base}
    if scores.keys() != base.keys() or not all(common.values()):
        return None, 0
    tasks = [
        paired_difference(*([side[task][q] for q in sorted(asked)] for side in (scores, base)))
        for task, asked in common.items()
    ]
    return mean_estimate(tasks), sum(map(len, common.values()))


def _reference(run: Run) -> str:
    return "full" if "full" in run.plan_names else [*run.model_plans, *run.plan_names][0]


def _scores(run: Run, plan: str) -> Scores:
    scores: dict[str, dict[str, float]] = {}
    for record in run.predictions(plan):
        scores.setdefault(record["task"], {})[record["question_id"]] = record["score"]
    return scores
