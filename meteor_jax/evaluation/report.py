"""What an evaluation leaves behind: a table on the screen, eval.json, predictions, a picture."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from rich.console import Console
from rich.table import Table
from sklearn.isotonic import isotonic_regression

from meteor_jax import __version__
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

EVAL_FILE = "eval.json"
CURVE_FILE = "accuracy_vs_tokens.png"
PREDICTIONS_FOLDER = "predictions"
PACKAGES = ("jax", "flax", "numpy")
LABEL_WIDTH, LABEL_HEIGHT = 0.15, 0.048  # of a name in the picture, as shares of the axes
INK, MUTED, ACCENT = "#1b1f24", "#6b7280", "#2563eb"


def print_table(rows: Sequence[Row], *, console: Console | None = None) -> None:
    """The rows task by task, then every plan's mean over the tasks of a group and of all.

    ± is half the width of a 95 % interval; eval.json has both ends.
    """
    console = console or Console()
    table = Table(header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("task", "plan"):  # these fold where a terminal is narrow; numbers never do
        table.add_column(name, overflow="fold", min_width=5)
    for name in ("score %", "vs full", "F1", "n", "tokens", "GFLOPs", "ms"):
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
) -> None:
    """eval.json: config, plans, versions, rows and averages; the file is whole or absent."""
    content = {
        "step": step,
        "config": config,
        "plans": {plan.name: dataclasses.asdict(plan) for plan in plans},
        # Our own from the source: a clone runs without being installed.
        "versions": {"meteor_jax": __version__} | {name: version(name) for name in PACKAGES},
        "rows": [dataclasses.asdict(row) for row in rows],
        "averages": averages(rows),
    }
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_predictions(folder: Path, questions: Sequence[Question], result: PlanResult) -> Path:
    """`<plan>.jsonl` in `folder`: one object a question. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(result.plan)}.jsonl"
    lines = [
        json.dumps(
            {
                "task": question.task.name,
                "question_id": question.question_id,
                "image_id": question.image_id,
                "question": question.question,
                "answer": question.answer,
                "prediction": answer.prediction,
                "score": answer.score,
                "kept": list(answer.kept),
                "corrupt": answer.corrupt,
            },
            ensure_ascii=False,
        )
        for question, answer in zip(questions, result.answers, strict=True)
    ]
    _write(path, "\n".join(lines) + "\n")
    return path


def file_name(plan: str) -> str:
    """A plan's name without what file systems dislike: `fastv(layer=2,keep=8)` → `fastv_layer…`."""
    return re.sub(r"[^\w.=-]+", "_", plan).strip("_")


def draw_curve(path: Path, rows: Sequence[Row]) -> None:
    """accuracy_vs_tokens.png: mean score over the tasks against visual tokens, a point a plan.

    Error bars combine the tasks' 95 % intervals as if the tasks were independent.
    """
    points = {}
    for plan, means in averages(rows).items():
        of_plan = [row for row in rows if row.plan == plan and row.group != COMBINED]
        below = sum((row.score - row.low) ** 2 for row in of_plan) ** 0.5 / len(of_plan)
        above = sum((row.high - row.score) ** 2 for row in of_plan) ** 0.5 / len(of_plan)
        tokens = sum(row.visual_tokens_mean for row in of_plan) / len(of_plan)
        points[plan] = (tokens, 100 * means["all"], 100 * below, 100 * above)
    figure = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if "full" in points:
        axes.axhline(points["full"][1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 4)))
    for plan, (tokens, score, below, above) in points.items():
        baseline = plan in (BLIND, MAJORITY)
        color = MUTED if baseline else ACCENT
        axes.errorbar(
            tokens, score, yerr=[[below], [above]], fmt="o", markersize=4 if baseline else 6,
            color=color, ecolor=color, elinewidth=1, capsize=3,
        )
    axes.margins(x=0.14, y=0.12)
    _label(axes, {plan: point[:2] for plan, point in points.items()})
    axes.set_xlabel("visual tokens a question (mean over the layers of the LLM)", color=INK)
    axes.set_ylabel("score, mean over tasks (%)", color=INK)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c8ccd2")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, facecolor="white")
    partial.replace(path)


def _label(axes: Any, points: Mapping[str, tuple[float, float]]) -> None:
    """Names beside the points, moved apart where they would meet, with a line to their point."""
    axes.autoscale_view()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    placed = {
        plan: ((x - left) / (right - left), (y - bottom) / (top - bottom))
        for plan, (x, y) in points.items()
    }
    columns: list[list[str]] = []
    for plan in sorted(placed, key=lambda plan: placed[plan]):
        if not columns or placed[plan][0] - placed[columns[-1][0]][0] > LABEL_WIDTH:
            columns.append([])
        columns[-1].append(plan)
    for column in columns:
        column.sort(key=lambda plan: placed[plan][1])
        gaps = LABEL_HEIGHT * np.arange(len(column))
        # The least moves that keep the gaps: isotonic regression.
        heights = isotonic_regression([placed[plan][1] for plan in column] - gaps) + gaps
        edge = max(placed[plan][0] for plan in column) + 0.035
        for plan, height in zip(column, heights, strict=True):
            text = axes.annotate(
                plan, points[plan], xytext=(edge, height), textcoords="axes fraction", va="center",
                fontsize=8, color=INK, zorder=5,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkB": 5},
            )
            text.set_path_effects([withStroke(linewidth=3, foreground="white")])


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
        f"{row.visual_tokens_mean:.1f}" if measured else "",
        f"{1000 * row.tflops:,.3g}" if measured else "",
        f"{1000 * row.seconds:.1f}" if measured else "",
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
