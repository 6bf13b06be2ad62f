"""What an evaluation shows: a table on the terminal and a chart of accuracy versus tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from meteor_jax.evaluation.metrics import Estimate, mean_estimate
from meteor_jax.evaluation.results import COMBINED, Row, averages
from meteor_jax.experiment.plans import BLIND, MAJORITY
from meteor_jax.parallel.distributed import is_main_process
from meteor_jax.reports.plots import PAPER, TOKENS_LABEL, Point, score_figure

CURVE_FILE = "accuracy_vs_tokens.png"


def print_table(rows: Sequence[Row], *, console: Console | None = None) -> None:
    """The rows task by task, then every plan's mean over the tasks of a group and of all.

    Numbers are readable from 80 columns on. ± is half the width of a 95 % interval; eval.json has
    both ends. "kept" and "computed" are visual tokens, means over the decoder's layers; GFLOPs are
    those of the computed tokens; "ms" is wall time per question.
    """
    console = console or Console()
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task, plan", overflow="fold", min_width=10)  # the only column that wraps
    for name in ("score %", "vs full", "F1", "kept", "computed", "GFLOPs", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        table.add_row(f"[bold]{task}[/bold]", f"n={of_task[0].n:,}")
        for row in of_task:
            style = "dim" if row.plan in (BLIND, MAJORITY) else None
            table.add_row(Padding(Text(row.plan), (0, 0, 0, 2)), *_cells(row), style=style)
        table.add_section()
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
    table = Table("mean % over tasks", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for group in groups:
        table.add_column(group, justify="right")
    for plan, scores in means.items():
        cells = [_percent(scores[group]) if group in scores else "" for group in groups]
        table.add_row(Text(plan), *cells, style="dim" if plan in (BLIND, MAJORITY) else None)
    return table


def show_results(rows: Sequence[Row], *, workdir: Path, console: Console | None = None) -> None:
    """Prints the table and draws accuracy_vs_tokens.png, on the main process; nothing where there
    are no rows, since all tasks are to be submitted."""
    if rows and is_main_process():
        draw_curve(workdir / CURVE_FILE, rows)
        print_table(rows, console=console)


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
            x=sum(map(cost, of_plan)) / len(of_plan),
            score=100 * score.mean,
            low=100 * score.low,
            high=100 * score.high,
            series=-1 if plan in (BLIND, MAJORITY) else series,
        )
    return points


def _cells(row: Row) -> list[str]:
    delta = ""
    if row.difference is not None:
        mean, low, high = row.difference
        delta = f"{100 * mean:+.1f} ±{50 * (high - low):.1f}"
    measured = row.plan != MAJORITY
    costs = (
        row.visual_tokens_kept,
        row.visual_tokens_computed,
        1000 * row.tflops,
        1000 * row.seconds,
    )
    return [
        f"{_percent(row.score)} ±{50 * (row.high - row.low):.1f}",
        delta,
        "" if row.f1 is None else _percent(row.f1),
        *(_number(cost) if measured else "" for cost in costs),
    ]


def _number(value: float) -> str:
    """Three digits, and none is lost before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
