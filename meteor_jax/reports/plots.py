"""The charts of an evaluation: scores against what they cost, kept tokens, encoders' shares."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from meteor_jax.evaluation.token_stats import PERCENTILES

KEPT_LABEL = "visual tokens kept per question, mean over LLM layers"
TOKENS_LABEL = "visual tokens computed per question, mean over LLM layers"
LONGEST_NAME = 30
LABEL_WIDTH, LABEL_HEIGHT = 0.2, 0.055  # of a name in a chart, as shares of the axes
INK, MUTED, PAPER, LINE = "#1b1f24", "#6b7280", "#ffffff", "#d8dce1"
SERIES = ("#2563eb", "#c2410c", "#047857", "#7c3aed", "#a16207")


@dataclasses.dataclass(frozen=True)
class Point:
    """One plan in a chart of scores: percent, and the ends of its 95 % interval.

    Attributes:
        series: which colour; −1 for a baseline that sees no image.
    """

    x: float
    score: float
    low: float
    high: float
    series: int = 0


def score_figure(
    points: Mapping[str, Point], *, x_label: str, reference: float | None = None
) -> Figure:
    """Mean score over the tasks against what it costs, a named point a plan.

    Args:
        reference: a score that a dashed line marks.
    """
    figure, axes = _figure(5.6, 3.7)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=0.8, linestyle=(0, (4, 4)))
    for point in points.values():
        color = MUTED if point.series < 0 else SERIES[point.series % len(SERIES)]
        axes.errorbar(
            point.x,
            point.score,
            yerr=[[point.score - point.low], [point.high - point.score]],
            fmt="o",
            markersize=4 if point.series < 0 else 6,
            color=color,
            elinewidth=1,
            capsize=3,
        )
    axes.margins(x=0.16, y=0.12)
    _label(axes, {name: (point.x, point.score) for name, point in points.items()})
    axes.set_xlabel(x_label, color=INK, fontsize=9)
    axes.set_ylabel("score, mean over tasks (%)", color=INK, fontsize=9)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    return figure


def spread_figure(rows: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Kept tokens by question: a line from the 5th to the 95th percentile, a bar between the
    quartiles, a dot at the mean.

    Args:
        rows: by label, what `token_stats.describe` gives.
    """
    figure, axes = _figure(5.6, 0.9 + 0.27 * len(rows))
    for place, spread in enumerate(rows.values()):
        low, first, _, third, high = (spread["percentiles"][str(p)] for p in PERCENTILES)
        axes.plot([low, high], [place, place], color=SERIES[0], linewidth=1)
        axes.plot(
            [first, third],
            [place, place],
            color=SERIES[0],
            linewidth=6,
            alpha=0.35,
            solid_capstyle="butt",
        )
        axes.plot(spread["mean"], place, "o", color=SERIES[0], markersize=5)
    axes.set_yticks(range(len(rows)), [*map(shorten, rows)], color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(KEPT_LABEL, color=INK, fontsize=9)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    return figure


def share_figure(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """By plan, which encoders the tokens that enter the LLM come from: one stacked bar a plan."""
    figure, axes = _figure(5.6, 1.1 + 0.3 * len(shares))
    encoders = list(dict.fromkeys(name for share in shares.values() for name in share))
    left = np.zeros(len(shares))
    for index, encoder in enumerate(encoders):
        widths = np.array([100 * share.get(encoder, 0.0) for share in shares.values()])
        axes.barh(
            range(len(shares)),
            widths,
            left=left,
            height=0.62,
            label=encoder,
            color=SERIES[index % len(SERIES)],
            edgecolor=PAPER,
            linewidth=1,
        )
        left += widths
    axes.set_yticks(range(len(shares)), [*map(shorten, shares)], color=INK)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the tokens that enter the LLM", color=INK, fontsize=9)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(encoders),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1,
        borderaxespad=0.2,
    )
    return figure


def shorten(name: str) -> str:
    """A long name without its middle, so that it leaves room for the chart."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[1 - half :]}"


def to_svg(figure: Figure, *, name: str) -> str:
    """The figure as an SVG element; `name` keeps its ids apart from those of others on a page."""
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", facecolor=PAPER, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    return figure, axes


def _label(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
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
        # From below, each at its point or one gap above the label before it; all inside the axes.
        heights = np.maximum.accumulate([placed[plan][1] for plan in column] - gaps) + gaps
        heights -= max(heights[-1] - 1, 0)
        edge = max(placed[plan][0] for plan in column) + 0.035
        for plan, height in zip(column, heights, strict=True):
            _annotate(axes, plan, points[plan], place=(edge, height))


def _annotate(
    axes: Axes, text: str, point: tuple[float, float], *, place: tuple[float, float]
) -> None:
    label = axes.annotate(
        shorten(text),
        point,
        xytext=place,
        textcoords="axes fraction",
        va="center",
        fontsize=8,
        color=INK,
        zorder=5,
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkB": 5},
    )
    label.set_path_effects([withStroke(linewidth=3, foreground=PAPER)])
