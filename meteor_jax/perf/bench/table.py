"""How the bench's rows are shown: a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
COLORS = {"encode_s": "#1d4ed8", "prefill_s": "#0d9488", "decode_s": "#d97706"}


def print_table(rows: Sequence[Row], *, console: Console) -> None:
    """Each batch size under its first plan, which the others are compared with."""
    title = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    columns = [
        "batch",
        "plan",
        "encode s",
        "prefill s",
        "ms a token",
        "end to end s",
        "× first",
        "tokens",
        "TFLOPs",
        "peak GB",
        "compile s",
    ]
    if trained := "train_step_s" in rows[0]:
        columns.append("train step s")
    mfu = rows[0]["prefill_mfu"] is not None
    columns += ["MFU encode", "MFU prefill", "bandwidth decode"] if mfu else []
    table = Table(*columns, title=title)
    for row in rows:
        first = next(other for other in rows if other["batch"] == row["batch"])
        cells = [
            str(row["batch"]),
            row["plan"],
            _spread(row, "encode_s"),
            _spread(row, "prefill_s"),
            _spread(row, "decode_ms_per_token"),
            _spread(row, "end_to_end_s"),
            f"{first['end_to_end_s'] / row['end_to_end_s']:.2f}",
            f"{row['tokens']:.0f}",
            f"{row['tflops']:.3g}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['compile_s']:.0f}",
        ]
        cells += [_spread(row, "train_step_s")] if trained else []
        if mfu:
            shares = ("encode_mfu", "prefill_mfu", "decode_bandwidth")
            cells += [f"{100 * row[name]:.0f} %" for name in shares]
        table.add_row(*cells, end_section=row["plan"] == rows[-1]["plan"])
    console.print(table)


def _spread(row: Row, name: str) -> str:
    low, high = row["spread"][name]
    return f"{row[name]:.3g} ({low:.3g}–{high:.3g})"


def draw(path: Path, rows: Sequence[Row]) -> None:
    """One bar a row: how long an example takes, part by part."""
    figure = Figure(figsize=(7, 1.0 + 0.42 * len(rows)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{row['plan']}, batch {row['batch']}" for row in rows]
    left = [0.0] * len(rows)
    for part, color in COLORS.items():
        widths = [row[part] / row["batch"] for row in rows]
        axes.barh(names, widths, left=left, color=color, label=part.removesuffix("_s"), height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in enumerate(rows):
        low, high = (value / row["batch"] for value in row["spread"]["end_to_end_s"])
        axes.plot([low, high], [place, place], color="#111827", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("seconds an example; the line spans the fastest and the slowest run")
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, facecolor="white")
