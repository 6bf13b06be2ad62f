"""What an evaluation leaves behind: a table on the screen, eval.json, predictions, a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from meteor_jax.evaluation.files import (
    file_name,
    prediction_line,
    versions,
    write_lines,
    write_text,
)
from meteor_jax.evaluation.metrics import Estimate, mean_estimate
from meteor_jax.evaluation.plots import PAPER, TOKENS_LABEL, Point, score_figure
from meteor_jax.evaluation.results import (
    BLIND,
    COMBINED,
    MAJORITY,
    PlanResult,
    Row,
    averages,
)
from meteor_jax.evaluation.tasks import Question
from meteor_jax.pruning.plan import PrunePlan

EVAL_FILE = "eval.json"  # of the newest evaluation; `kept_file` is for those before it
CURVE_FILE = "accuracy_vs_tokens.png"
PREDICTIONS_FOLDER = "predictions"


def print_table(rows: Sequence[Row], *, console: Console | None = None) -> None:
    """The rows task by task, then every plan's mean over the tasks of a group and of all.

    ± is half the width of a 95 % interval; eval.json has both ends. "kept" and "computed" are
    visual tokens, means over the decoder's layers; GFLOPs are those computed.
    """
    console = console or Console()
    table = Table(header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("task", "plan"):  # these fold where a terminal is narrow; numbers never do
        table.add_column(name, overflow="fold", min_width=5)
    for name in ("score %", "vs full", "F1", "n", "kept", "computed", "GFLOPs", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    tasks = list(dict.fromkeys(row.task for row in rows))
    for task in tasks:
        of_task = [row for row in rows if row.task == task]
        for index, row in enumerate(of_task):
            style = "dim" if row.plan in (BLIND, MAJORITY) else None
            last = index == len(of_task) - 1
            cells = _cells(row)
            table.add_row(task if index == 0 else "", *cells, style=style, end_section=last)
    console.print(table)
    console.print(_mean_table(rows))
    corrupt = max((row.corrupt for row in rows if row.group != COMBINED), default=0)
    if corrupt:
        console.print(f"Up to {corrupt} questions of a task have a corrupt image; scored wrong.")
    if non_finite := sum(row.non_finite for row in rows if row.group != COMBINED):
        console.print(
            f"{non_finite} answers come from logits that are NaN or infinite and mean nothing "
            "(non_finite in predictions): look at the checkpoint, or compute in float32."
        )


def _mean_table(rows: Sequence[Row]) -> Table:
    means = averages(rows)
    names = dict.fromkeys(group for groups in means.values() for group in groups)
    groups = [*(name for name in names if name != "all"), "all"]
    table = Table("mean % over tasks", header_style="bold", pad_edge=False)
    for group in groups:
        table.add_column(group, justify="right")
    for plan, scores in means.items():
        cells = [_percent(scores[group]) if group in scores else "" for group in groups]
        table.add_row(plan, *cells, style="dim" if plan in (BLIND, MAJORITY) else None)
    return table


def write_eval(
    path: Path,
    rows: Sequence[Row],
    *,
    config: Mapping[str, Any],
    plans: Sequence[PrunePlan],
    step: int | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """eval.json: config, plans, versions, rows and averages; the file is whole or absent.

    Args:
        details: more fields, by name.
    """
    content = {
        "step": step,
        "config": config,
        "plans": {plan.name: dataclasses.asdict(plan) for plan in plans},
        "versions": versions(),
        **(details or {}),
        "rows": [dataclasses.asdict(row) for row in rows],
        "averages": averages(rows),
    }
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def kept_file(workdir: Path, *, step: int | None, params: str) -> Path:
    """Where a checkpoint's eval.json is kept, whatever is evaluated after it: `eval_step_7.json`,
    with the digest `params` in its name where other parameters of that step have the file."""
    path = workdir / ("eval_no_step.json" if step is None else f"eval_step_{step}.json")
    if path.is_file() and json.loads(path.read_text(encoding="utf-8"))["params"] != params:
        return path.with_name(f"{path.stem}-{params}.json")
    return path


def write_predictions(folder: Path, questions: Sequence[Question], result: PlanResult) -> Path:
    """`<plan>.jsonl` in `folder`: one object a question. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(result.plan)}.jsonl"
    write_lines(path, map(prediction_line, questions, result.answers))
    return path


def draw_curve(path: Path, rows: Sequence[Row]) -> None:
    """accuracy_vs_tokens.png: mean score over the tasks against visual tokens, a point a plan."""
    points = plan_points(rows, cost=lambda row: row.visual_tokens_computed)
    reference = points["full"].score if "full" in points else None
    figure = score_figure(points, x_label=TOKENS_LABEL, reference=reference)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, facecolor=PAPER)
    partial.replace(path)


def plan_points(
    rows: Sequence[Row], *, cost: Callable[[Row], float], series: int = 0
) -> dict[str, Point]:
    """By plan, its mean score over the tasks and its mean cost.

    The ends combine the tasks' 95 % intervals as if the tasks were independent.
    """
    points = {}
    for plan in averages(rows):
        of_plan = [row for row in rows if row.plan == plan and row.group != COMBINED]
        score = mean_estimate([Estimate(row.score, row.low, row.high) for row in of_plan])
        points[plan] = Point(
            x=sum(map(cost, of_plan)) / len(of_plan), score=100 * score.mean,
            low=100 * score.low, high=100 * score.high,
            series=-1 if plan in (BLIND, MAJORITY) else series,
        )
    return points


def choose_examples(
    scores: Sequence[float], images: Sequence[Any], *, count: int
) -> list[int]:
    """Which answers to show: half of them wrong, half right, the first there are, each with an
    image of its own. Where there are too few of a kind, the other fills in."""
    chosen: list[int] = []
    seen: set[Any] = set()
    left = {False: count - count // 2, True: count // 2}
    for fills_in in (False, True):
        for i, (score, image) in enumerate(zip(scores, images, strict=True)):
            is_right = score >= 0.5
            if len(chosen) < count and image not in seen and (fills_in or left[is_right]):
                left[is_right] -= 1
                chosen.append(i)
                seen.add(image)
    return sorted(chosen)


def _cells(row: Row) -> list[str]:
    delta = "" if row.delta is None else f"{100 * row.delta:+.1f}"
    if row.delta is not None:
        delta += f" ±{50 * (row.delta_high - row.delta_low):.1f}"
    measured = row.plan != MAJORITY
    return [
        row.plan,
        f"{_percent(row.score)} ±{50 * (row.high - row.low):.1f}",
        delta,
        "" if row.f1 is None else _percent(row.f1),
        str(row.n),
        f"{row.visual_tokens_kept:.1f}" if measured else "",
        f"{row.visual_tokens_computed:.1f}" if measured else "",
        f"{1000 * row.tflops:,.3g}" if measured else "",
        f"{1000 * row.seconds:.1f}" if measured else "",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
