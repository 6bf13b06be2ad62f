"""A report of one or more evaluations, for reading and for sending on.

`report.html` needs no other file; `report.md` has its pictures beside it. What a run lacks
(predictions, examples, several plans) makes the report shorter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meteor_jax.evaluation.results import COMBINED, Row
from meteor_jax.evaluation.token_stats import PERCENTILES
from meteor_jax.evaluation.visualize import choose_examples
from meteor_jax.experiment.plans import BLIND, MAJORITY
from meteor_jax.reports.comparison import paired_comparison, paper_comparison, seed_variance
from meteor_jax.reports.page import ABSENT, Picture, Section, Table, write_page
from meteor_jax.reports.plots import (
    TOKENS_LABEL,
    score_figure,
    share_figure,
    spread_figure,
    to_svg,
)
from meteor_jax.reports.runs import Run, percent_of, read_runs
from meteor_jax.reports.tables import plan_points

SHOWN_ANSWERS = 12  # of one plan: questions with their answers, correct and incorrect
SHOWN_SPREADS = 24  # lines of the chart of kept tokens


def write_report(paths: Sequence[str | Path], output: str | Path) -> Path:
    """Writes report.md and report.html into `output`; returns the path of the latter.

    Args:
        paths: eval.json files, or folders that hold one.

    Raises:
        ConfigError: if a path is no eval.json.
    """
    runs = read_runs(paths)
    sections = [
        summary(runs),
        scores(runs),
        paired_comparison(runs),
        seed_variance(runs),
        paper_comparison(runs),
        cost_charts(runs),
        kept_tokens(runs),
        encoder_shares(runs),
        examples(runs),
        answers(runs),
        method(runs),
    ]
    title = "Evaluation: " + ", ".join(run.name for run in runs)
    return write_page(Path(output), [each for each in sections if each is not None], title=title)


def summary(runs: Sequence[Run]) -> Section:
    """What was evaluated, and in a sentence each what the pruned plans keep."""
    sizes, plans = {}, {}
    for run in runs:
        step = "" if run.step is None else f"step {run.step:,}, "
        sizes[run.name] = f"{step}{len(run.tasks)} tasks, {run.num_questions:,} questions"
        full = run.full_score
        for plan in run.pruned:
            score = run.mean_score(plan)
            text = f"{score:.1f} %"
            if full is not None:
                kept = percent_of(run.tokens_kept(plan), run.tokens_kept("full"))
                computed = percent_of(run.tokens_computed(plan), run.tokens_computed("full"))
                text += (
                    f" ({score - full:+.1f} points versus full), with {kept} of the visual tokens "
                    f"kept and {computed} computed"
                )
            plans[run.label(plan)] = text
    return Section("Summary", [sizes, plans])


def scores(runs: Sequence[Run]) -> Section:
    """Scores and costs of every plan, and each plan's difference from the unpruned one."""
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    rows = []
    for run in runs:
        for plan in run.plan_names:
            by_task = run.by_task(plan)
            cost = [ABSENT] * 4
            if plan != MAJORITY:
                cost = [
                    f"{run.tokens_kept(plan):.1f}",
                    f"{run.tokens_computed(plan):.1f}",
                    f"{1e3 * run.mean(plan, 'tflops'):,.4g}",
                    f"{1e3 * run.mean(plan, 'seconds'):.2f}",
                ]
            cells = (_score_cell(by_task[task]) if task in by_task else ABSENT for task in tasks)
            rows.append([run.label(plan), *cost, f"{run.mean_score(plan):.1f}", *cells])
    blocks = [
        "Percent ± half the width of a 95 % confidence interval. Kept and computed are visual "
        "tokens per question, averaged over the LLM's layers. GFLOPs are those of the computed "
        "tokens. ms is the measured wall time per question, with images shared. "
        f"'{BLIND}' is the text-only baseline: the model does not see the image. '{MAJORITY}' is "
        "the majority class: each task's most frequent answer.",
        Table(["plan", "kept", "computed", "GFLOPs", "ms", "mean", *tasks], rows),
    ]
    if any(set(run.tasks) != set(runs[0].tasks) for run in runs):
        blocks.append("The runs have different tasks, so their means are not comparable.")
    differences = [
        [
            run.label(row.plan),
            row.task,
            f"{100 * found[0]:+.1f}",
            f"{100 * found[1]:+.1f} … {100 * found[2]:+.1f}",
        ]
        for run in runs
        for row in run.rows
        if row.plan in run.pruned and row.group != COMBINED and (found := row.difference)
    ]
    if differences:
        header = ["plan", "task", "difference", "95 % interval"]
        text = "Paired differences over the same questions, in percentage points."
        blocks.append(Section("Versus full", [text, Table(header, differences, text_columns=2)]))
    return Section("Scores", blocks)


def cost_charts(runs: Sequence[Run]) -> Section:
    """Mean score against computed tokens and against measured time."""
    reference = runs[0].full_score if len(runs) == 1 else None

    def chart(name: str, text: str, *, field: str, scale: float, x_label: str) -> Picture:
        points = {
            run.label(plan): point
            for index, run in enumerate(runs)
            for plan, point in plan_points(
                run.rows, cost=lambda row: scale * getattr(row, field), series=index
            ).items()
            if plan in run.model_plans  # baselines score far lower and would compress the scale
        }
        return _chart(name, score_figure(points, x_label=x_label, reference=reference), text)

    return Section(
        "Accuracy versus cost",
        [
            chart(
                "accuracy_tokens",
                "score against visual tokens",
                field="visual_tokens_computed",
                scale=1,
                x_label=TOKENS_LABEL,
            ),
            chart(
                "accuracy_seconds",
                "score against measured time",
                field="seconds",
                scale=1e3,
                x_label="milliseconds per question, measured",
            ),
        ],
    )


def kept_tokens(runs: Sequence[Run]) -> Section | None:
    """How the number of kept tokens varies over the questions of a task."""
    rows, charted = [], {}
    for run in runs:
        for plan, by_task in run.kept_tokens.items():
            for task, kept in by_task.items():
                spread = kept["mean_over_layers"]
                values = [
                    spread["mean"],
                    spread["min"],
                    *(spread["percentiles"][str(p)] for p in PERCENTILES),
                    spread["max"],
                ]
                steps = " → ".join(f"{step['mean']:.1f}" for step in kept["prune_steps"])
                cells = [f"{value:.1f}" for value in values]
                rows.append([run.label(plan), task, *cells, steps or ABSENT])
                if spread["min"] < spread["max"]:
                    charted[f"{run.label(plan)} · {task}"] = spread
    if not rows:
        return None
    percentiles = [f"{percentile} %" for percentile in PERCENTILES]
    header = ["plan", "task", "mean", "min", *percentiles, "max", "after each step in the LLM"]
    blocks = [
        "Visual tokens kept per question, averaged over the LLM's layers: mean and percentiles "
        "over the questions of a task, and the mean after each pruning step in the LLM.",
        Table(header, rows, text_columns=2),
    ]
    if charted:
        figure = spread_figure(dict(list(charted.items())[:SHOWN_SPREADS]))
        blocks.append(_chart("kept_tokens", figure, "distribution of the kept tokens"))
    return Section("Kept tokens", blocks)


def encoder_shares(runs: Sequence[Run]) -> Section | None:
    """Which encoders the tokens that enter the LLM come from."""
    shares = {run.label(plan): share for run in runs for plan, share in run.shares.items()}
    if not shares:
        return None
    encoders = list(dict.fromkeys(name for share in shares.values() for name in share))
    rows = [
        [label, *(f"{100 * share[e]:.0f}" if e in share else ABSENT for e in encoders)]
        for label, share in shares.items()
    ]
    sources = "; ".join(dict.fromkeys(run.shares_from for run in runs if run.shares))
    return Section(
        "Tokens by encoder",
        [
            f"Percent of the tokens that enter the LLM ({sources}).",
            Table(["plan", *encoders], rows),
            _chart("shares", share_figure(shares), "share of each encoder"),
        ],
    )


def examples(runs: Sequence[Run]) -> Section | None:
    """Pictures that the evaluation drew, a subsection each."""
    blocks = []
    for index, run in enumerate(runs):
        for example in run.examples:
            picture = run.examples_folder / example["picture"]
            verdict = "Correct" if _is_correct(example) else "Incorrect"
            text = (
                f"{example['task']}, {example['plan']}: predicted “{example['prediction']}”, "
                f"reference “{example['answer']}”."
            )
            name = f"examples/{index}/{picture.name}"
            drawn = Picture(name, "kept tokens", picture.read_bytes())
            blocks.append(Section(f"{verdict}: {example['question']}", [text, drawn]))
    text = "Bright cells are the tokens kept after each step of a plan."
    return Section("Examples", [text, *blocks]) if blocks else None


def answers(runs: Sequence[Run]) -> Section | None:
    """Answers of each run's first pruned plan, beside those of full to the same questions."""
    blocks = []
    for run in runs:
        plan = next(iter([*run.pruned, *run.model_plans]), "")
        records = run.predictions(plan)
        if not records:
            continue
        full = {_key(record): record for record in run.predictions("full")}
        chosen = choose_examples(
            [record["score"] for record in records],
            [record["image_id"] for record in records],
            count=SHOWN_ANSWERS,
        )
        rows = []
        for record in sorted((records[i] for i in chosen), key=lambda record: record["score"]):
            other = full.get(_key(record))
            rows.append(
                [
                    _mark(record),
                    record["task"],
                    record["question"],
                    record["answer"],
                    record["prediction"],
                    ABSENT if other is None else f"{other['prediction']} {_mark(other)}",
                    " → ".join(map(str, record["kept"])) or ABSENT,
                ]
            )
        header = ["", "task", "question", "reference", plan, "full", "kept"]
        content = [Table(header, rows, text_columns=len(header))]
        if full and plan != "full":
            common = [record for record in records if _key(record) in full]
            pairs = [(_is_correct(r), _is_correct(full[_key(r)])) for r in common]
            content.append(
                f"Of {len(records):,} answers, {pairs.count((False, True)):,} are correct with "
                f"full only and {pairs.count((True, False)):,} with {plan} only."
            )
        blocks.append(Section(run.label(plan), content))
    text = "The first answers of each kind, one per image."
    return Section("Correct and incorrect answers", [text, *blocks]) if blocks else None


def method(runs: Sequence[Run]) -> Section:
    """With what each run was measured."""
    return Section(
        "Method",
        [{run.name: ", ".join([str(run.path), *run.versions, *run.devices]) for run in runs}],
    )


def _chart(name: str, figure: Any, text: str) -> Picture:
    return Picture(f"figures/{name}.svg", text, to_svg(figure, name=name).encode())


def _score_cell(row: Row) -> str:
    points = f" ({row.parts['points']:,.0f} points)" if "points" in row.parts else ""
    return f"{100 * row.score:.1f} ±{50 * (row.high - row.low):.1f}{points}"


def _key(record: Mapping[str, Any]) -> tuple:
    return record["task"], record["question_id"]


def _is_correct(record: Mapping[str, Any]) -> bool:
    return record["score"] >= 0.5


def _mark(record: Mapping[str, Any]) -> str:
    return "✓" if _is_correct(record) else "✗"
