"""Plans of several runs: against one of them, question by question, and over repeated trainings.

For models that were trained apart, each with the plan it is evaluated under: each run has its own
eval.json, none has both sides of the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from meteor_jax.evaluation.metrics import Estimate, mean_estimate, paired_difference
from meteor_jax.evaluation.results import averages
from meteor_jax.reports.page import ABSENT, escape, table
from meteor_jax.reports.runs import Run

Scores = Mapping[str, Mapping[str, float]]  # by task and question


def paired_comparison(runs: Sequence[Run]) -> str:
    """A section of the report: each plan's mean scores, and how far it is from the reference, the
    first run's "full", or its first plan where it has no such.

    The difference is the mean over the tasks, each over the questions that both were asked; its
    95 % interval combines the tasks' as if they were independent. Empty for a single run, and
    where no predictions lie beside the reference.
    """
    first = runs[0]
    reference = _reference(first)
    base = _scores(first, reference)
    if len(runs) == 1 or not base:
        return ""
    groups = [group for run in runs for means in averages(run.rows).values() for group in means]
    groups = [*dict.fromkeys(group for group in groups if group != "all"), "all"]
    rows = []
    for run in runs:
        means = averages(run.rows)
        for plan in run.model_plans:
            is_reference = run is first and plan == reference
            change, asked = (None, 0) if is_reference else mean_difference(_scores(run, plan), base)
            rows.append(
                [
                    escape(f"{run.name}/{plan}"),
                    f"{run.tokens_kept(plan):.1f}",
                    f"{run.tokens_computed(plan):.1f}",
                    *(
                        f"{100 * means[plan][g]:.1f}" if g in means[plan] else ABSENT
                        for g in groups
                    ),
                    *(
                        [ABSENT] * 3
                        if change is None
                        else [
                            f"{100 * change.mean:+.1f}",
                            f"{100 * change.low:+.1f} … {100 * change.high:+.1f}",
                            f"{asked:,}",
                        ]
                    ),
                ]
            )
    header = [
        "plan",
        "kept",
        "computed",
        *map(escape, groups),
        "difference",
        "95 % interval",
        "questions",
    ]
    return (
        f"## Against {escape(f'{first.name}/{reference}')}\n\n"
        "Percent, mean over the tasks of a group and over all; visual tokens kept and computed, "
        "means over the LLM's layers. The difference is of the same questions compared one by one, "
        "in points, mean over the tasks.\n\n" + table(header, rows)
    )


def seed_variance(runs: Sequence[Run]) -> str:
    """A section of the report: plans that several runs have, as trainings with other seeds do.

    Mean over the runs, standard deviation from run to run, and how far the mean is from that of
    the reference, as `paired_comparison` chooses it. Only runs with the first run's tasks count,
    and of the same parameters only the first. Empty where no plan is in two runs.
    """
    reference = _reference(runs[0])
    by_plan: dict[str, list[dict[str, float]]] = {}
    seen: set[tuple[str, str]] = set()  # plan and parameters: the same again is no training
    for run in runs:
        means, params = averages(run.rows), run.content.get("params", run.name)
        for plan in run.model_plans if set(run.tasks) == set(runs[0].tasks) else ():
            if (plan, params) not in seen:
                by_plan.setdefault(plan, []).append(means[plan])
            seen.add((plan, params))
    repeated = {plan: means for plan, means in by_plan.items() if len(means) > 1}
    if not repeated:
        return ""
    groups = [*(group for group in by_plan[reference][0] if group != "all"), "all"]
    base = np.mean([means["all"] for means in by_plan[reference]])
    rows = []
    for plan, means in repeated.items():
        of_group = {group: 100 * np.asarray([run[group] for run in means]) for group in groups}
        change = of_group["all"].mean() - 100 * base
        rows.append(
            [
                escape(plan),
                str(len(means)),
                *(
                    f"{scores.mean():.1f} ± {scores.std(ddof=1):.1f}"
                    for scores in of_group.values()
                ),
                ABSENT if plan == reference else f"{change:+.1f}",
            ]
        )
    header = ["plan", "runs", *map(escape, groups), f"against {escape(reference)}"]
    return (
        "## Over several runs\n\n"
        "Percent, mean over the tasks of a group, then over the runs, ± the standard deviation "
        "from run to run. The last column is the difference of these means, in points.\n\n"
        + table(header, rows)
    )


def mean_difference(scores: Scores, base: Scores) -> tuple[Estimate | None, int]:
    """How much better `scores` are than `base`, mean over the tasks; and of how many questions.

    None where the two have a task apart, or no question of a task in common.
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
    return "full" if "full" in run.plan_names else run.model_plans[0]


def _scores(run: Run, plan: str) -> Scores:
    scores: dict[str, dict[str, float]] = {}
    for record in run.predictions(plan):
        scores.setdefault(record["task"], {})[record["question_id"]] = record["score"]
    return scores
