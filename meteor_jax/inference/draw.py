"""Draws which tokens stay: on their image, one panel an encoder and a stage.

I images, K kept tokens, N tokens after fusion.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from meteor_jax.types import PruneTrace

EXAMPLES_FILE = "examples.json"
PANEL_INCHES = 1.05
BACKGROUND = np.array([62.0, 64.0, 72.0])  # dark: most pictures are bright
DROPPED_STRENGTH = 0.22  # how much of a dropped cell's picture shows through the background
DROPPED_COLOR_SHARE = 0.35  # how much of its colour is left, the rest being grey
MUTED = "#6b6b6b"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One column: by encoder, the raster indices alive for every image (a list of int arrays).

    An encoder that the stage does not touch is absent.
    """

    title: str
    kept: dict[str, list[np.ndarray]]


def draw_kept_tokens(
    images: np.ndarray,
    questions: Sequence[str],
    trace: PruneTrace,
    *,
    grids: Mapping[str, int],
    path: str | Path,
    title: str = "",
) -> None:
    """Writes a PNG: a block of rows for each image, a row for each encoder, a column a stage.

    Kept cells show the picture, dropped ones are faded. Below every panel stands the number of
    its kept tokens.

    Shapes:
        images: uint8[I, H, W, 3].
        trace: of exactly these images, each the only one of its row of the batch.

    Args:
        questions: one text an image; line breaks are kept.
        grids: by encoder, in the model's order, the side of its output grid.
        path: where the picture goes.
        title: above everything.

    Raises:
        ValueError: if there is not one question an image, or the trace is of other images.
    """
    if len(questions) != len(images) or len(trace.fused_raster) != len(images):
        raise ValueError(
            f"expected as many questions and traced images as images, got {len(images)} images, "
            f"{len(questions)} questions and a trace of {len(trace.fused_raster)}."
        )
    stages = read_stages(trace, encoders=tuple(grids))
    # An encoder that the plan left out never has a token.
    encoders = [name for name in grids if any(name in stage.kept for stage in stages)]
    block_rows = max(len(encoders), 2)  # the picture and its question need the height of two
    rows, columns = len(images) * block_rows, 2 + len(stages)
    figure = Figure(
        figsize=(PANEL_INCHES * (columns + 0.9), PANEL_INCHES * 1.17 * rows + 1.1), dpi=150
    )
    FigureCanvasAgg(figure)
    top = 1 - (0.75 if title else 0.4) / figure.get_figheight()
    grid = figure.add_gridspec(
        len(images),
        1,
        left=0.02,
        right=0.985,
        top=top,
        bottom=0.4 / figure.get_figheight(),
        hspace=0.10,
    )
    if title:
        figure.suptitle(
            title,
            x=0.02,
            y=1 - 0.12 / figure.get_figheight(),
            ha="left",
            va="top",
            fontsize=11,
            fontweight="bold",
        )
    for index, (image, question) in enumerate(zip(images, questions, strict=True)):
        block = grid[index].subgridspec(
            block_rows,
            columns,
            width_ratios=[2, 0.3] + [1] * len(stages),
            hspace=0.24,
            wspace=0.10,
        )
        _draw_question(figure.add_subplot(block[:, 0]), image, question)
        for row, encoder in enumerate(encoders):
            for column, stage in enumerate(stages):
                axes = figure.add_subplot(block[row, 2 + column])
                kept = stage.kept.get(encoder)
                _draw_panel(axes, image, None if kept is None else kept[index], grids[encoder])
                if row == 0 and index == 0:
                    axes.set_title(stage.title, fontsize=7.5, pad=4)
                if column == 0:
                    axes.set_ylabel(encoder, fontsize=7.5, labelpad=4)
    figure.savefig(path, facecolor="white")


def draw_examples(
    folder: str | Path,
    images: np.ndarray,
    records: Sequence[Mapping[str, Any]],
    trace: PruneTrace,
    *,
    grids: Mapping[str, int],
) -> Path:
    """One PNG an example, the tokens that stayed drawn on its image, and a list of them.

    `examples.json` holds the records, each with the name of its `picture` and with `kept`, its
    tokens by stage and encoder. Returns its path; the folder is made.

    Shapes:
        images: uint8[I, H, W, 3]; trace: as for `draw_kept_tokens`.

    Args:
        records: what to remember of each example; "question", "answer", "prediction" and "score"
            are written below its image.
        grids: as for `draw_kept_tokens`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages = read_stages(trace, encoders=tuple(grids))
    listed = []
    for i, record in enumerate(records):
        picture = f"{i:02d}.png"
        draw_kept_tokens(
            images[i : i + 1],
            [example_text(record)],
            _image_of_trace(trace, i),
            grids=grids,
            path=folder / picture,
        )
        kept = {
            stage.title: {encoder: len(rows[i]) for encoder, rows in stage.kept.items()}
            for stage in stages
        }
        listed.append(dict(record) | {"picture": picture, "kept": kept})
    path = folder / EXAMPLES_FILE
    path.write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def example_text(record: Mapping[str, Any]) -> str:
    """What is written below an example: its question, what was said to it, its answer."""
    verdict = "right" if record["score"] >= 0.5 else "wrong"
    question = textwrap.fill(str(record["question"]), 34)
    return f"{question}\nsaid: {record['prediction']} ({verdict})\nanswer: {record['answer']}"


def _image_of_trace(trace: PruneTrace, i: int) -> PruneTrace:
    return jax.tree.map(lambda array: array[i : i + 1] if np.ndim(array) else array, trace)


def read_stages(trace: PruneTrace, *, encoders: Sequence[str]) -> list[Stage]:
    """The stages of a trace in the order in which an image passes them."""
    stages = []
    num_boundaries = max((len(t.kept) for t in trace.encode.values()), default=0)
    for boundary in range(num_boundaries):
        kept = {
            name: list(np.asarray(encoder.kept[boundary]))
            for name, encoder in trace.encode.items()
            if len(encoder.kept) > boundary
        }
        stages.append(Stage(f"segment {boundary + 1}", kept))
    fused_encoder, fused_raster = np.asarray(trace.fused_encoder), np.asarray(trace.fused_raster)
    present = [i for i in range(len(encoders)) if (fused_encoder == i).any()]

    def by_encoder(chosen: Sequence[np.ndarray]) -> dict[str, list[np.ndarray]]:
        return {
            encoders[i]: [
                raster[idx][owner[idx] == i]
                for owner, raster, idx in zip(fused_encoder, fused_raster, chosen, strict=True)
            ]
            for i in present
        }

    everything = np.arange(fused_raster.shape[1])
    stages.append(Stage("fusion", by_encoder([everything] * len(fused_raster))))
    for number, cut in enumerate(trace.cuts, start=1):
        visual = np.asarray(cut.visual)
        stages.append(Stage(f"LLM cut {number}", by_encoder([row[row >= 0] for row in visual])))
    return stages


def shade(image: np.ndarray, kept: np.ndarray, *, grid: int) -> np.ndarray:
    """The image with every cell but the kept ones faded.

    Shapes:
        image: uint8[H, W, 3]; kept: int[K], row-major cells of a `grid` × `grid` net.
        returns: uint8[H, W, 3].
    """
    alive = np.zeros(grid * grid, bool)
    alive[kept] = True
    height, width = image.shape[:2]
    cell_row = np.arange(height) * grid // height
    cell_column = np.arange(width) * grid // width
    bright = alive.reshape(grid, grid)[cell_row[:, None], cell_column][..., None]
    pixels = image.astype(np.float64)
    grey = pixels.mean(-1, keepdims=True)
    dull = DROPPED_COLOR_SHARE * pixels + (1 - DROPPED_COLOR_SHARE) * grey
    faded = DROPPED_STRENGTH * dull + (1 - DROPPED_STRENGTH) * BACKGROUND
    return np.where(bright, pixels, faded).round().astype(np.uint8)


def _draw_question(axes: Axes, image: np.ndarray, question: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_anchor("N")
    _clean(axes)
    axes.set_xlabel(question, fontsize=7.5, loc="left", labelpad=5, linespacing=1.35)


def _draw_panel(axes: Axes, image: np.ndarray, kept: np.ndarray | None, grid: int) -> None:
    _clean(axes)
    if kept is None:
        axes.set_box_aspect(1)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.text(0.5, 0.5, "–", ha="center", va="center", color=MUTED, transform=axes.transAxes)
        return
    # Small pictures are enlarged first, so that the edges of cells are sharp.
    times = max(1, round(192 / image.shape[0]))
    enlarged = image.repeat(times, axis=0).repeat(times, axis=1)
    axes.imshow(shade(enlarged, kept, grid=grid), interpolation="nearest")
    axes.set_xlabel(f"{len(kept)} of {grid * grid}", fontsize=6, color=MUTED, labelpad=2)


def _clean(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
        spine.set_color("#c8c8c8")
