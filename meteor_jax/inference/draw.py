"""Draws the kept tokens on their image: a row per encoder, a column per stage of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from meteor_jax.types import PruneTrace

PANEL_INCHES = 1.05
BACKGROUND = np.array([62.0, 64.0, 72.0])  # dark: most pictures are bright
DROPPED_STRENGTH = 0.22  # how much of a dropped cell's picture shows through the background
DROPPED_COLOR_SHARE = 0.35  # how much of its colour is left, the rest being grey
MUTED = "#6b6b6b"


@dataclasses.dataclass(frozen=True)
class Stage:
    """The tokens of one image that a step of a plan kept.

    Attributes:
        kept: by encoder, bool[G, G]: which cells of its output grid. An encoder that the step does
            not prune is absent.
    """

    title: str
    kept: Mapping[str, np.ndarray]


def read_stages(trace: PruneTrace, *, grids: Mapping[str, int]) -> list[list[Stage]]:
    """By image, the stages of a trace in the order in which the image passes them.

    Args:
        trace: of prompts with one image each.
        grids: by encoder, in the order of `VisualTokens.encoder`, the side of its output grid.
    """
    encoders, cells = np.asarray(trace.fused_encoder), np.asarray(trace.fused_patch_index)
    numbers = {name: i for i, name in enumerate(grids) if (encoders == i).any()}
    segments = max((len(encoder.kept) for encoder in trace.encode.values()), default=0)

    def read(image: int) -> list[Stage]:
        stages = [
            Stage(
                f"segment {segment + 1}",
                {
                    name: _mask(np.asarray(encoder.kept[segment])[image], grid=grids[name])
                    for name, encoder in trace.encode.items()
                    if len(encoder.kept) > segment
                },
            )
            for segment in range(segments)
        ]
        kept = {"fusion": np.arange(cells.shape[1])}
        for number, step in enumerate(trace.prune_steps, start=1):
            visual = np.asarray(step.visual)[image]
            kept[f"LLM step {number}"] = visual[visual >= 0]
        for title, index in kept.items():
            encoder, cell = encoders[image, index], cells[image, index]
            of_encoder = {
                name: _mask(cell[encoder == number], grid=grids[name])
                for name, number in numbers.items()
            }
            stages.append(Stage(title, of_encoder))
        return stages

    return [read(image) for image in range(len(cells))]


def draw_kept_tokens(
    image: np.ndarray, stages: Sequence[Stage], *, caption: str = ""
) -> Image.Image:
    """The image and, for every encoder and stage, the image with all but its kept cells faded.

    The number of kept tokens is written below every panel.

    Args:
        image: uint8[H, W, 3].
        stages: one image's, of `read_stages`.
        caption: below the image; line breaks are kept.
    """
    # Later stages have all encoders in the model's order; one that the plan leaves out has none.
    encoders = list(dict.fromkeys(name for stage in reversed(stages) for name in stage.kept))
    rows = max(len(encoders), 2)  # the image and its caption need the height of two
    width, height = PANEL_INCHES * (len(stages) + 2.9), PANEL_INCHES * 1.17 * rows + 0.6
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows,
        2 + len(stages),
        width_ratios=[2, 0.3] + [1] * len(stages),
        left=0.02,
        right=0.985,
        top=1 - 0.3 / height,
        bottom=0.3 / height,
        hspace=0.24,
        wspace=0.10,
    )
    _draw_image(figure.add_subplot(grid[:, 0]), image, caption)
    for row, encoder in enumerate(encoders):
        for column, stage in enumerate(stages):
            axes = figure.add_subplot(grid[row, 2 + column])
            _draw_panel(axes, image, stage.kept.get(encoder))
            if row == 0:
                axes.set_title(stage.title, fontsize=7.5, pad=4)
            if column == 0:
                axes.set_ylabel(encoder, fontsize=7.5, labelpad=4)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def shade(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The image with every cell but the kept ones faded.

    Shapes:
        image: uint8[H, W, 3]; kept: bool[G, G], cells of a net over the image.
        returns: uint8[H, W, 3].
    """
    (height, width), grid = image.shape[:2], len(kept)
    cell_row = np.arange(height) * grid // height
    cell_column = np.arange(width) * grid // width
    bright = kept[cell_row[:, None], cell_column][..., None]
    pixels = image.astype(np.float64)
    grey = pixels.mean(-1, keepdims=True)
    dull = DROPPED_COLOR_SHARE * pixels + (1 - DROPPED_COLOR_SHARE) * grey
    faded = DROPPED_STRENGTH * dull + (1 - DROPPED_STRENGTH) * BACKGROUND
    return np.where(bright, pixels, faded).round().astype(np.uint8)


def _mask(cells: np.ndarray, *, grid: int) -> np.ndarray:
    mask = np.zeros(grid * grid, bool)
    mask[cells] = True
    return mask.reshape(grid, grid)


def _draw_image(axes: Axes, image: np.ndarray, caption: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_anchor("N")
    _clean(axes)
    axes.set_xlabel(
        caption,
        fontsize=7.5,
        loc="left",
        labelpad=5,
        linespacing=1.35,
        parse_math=False,  # a question may have dollars
    )


def _draw_panel(axes: Axes, image: np.ndarray, kept: np.ndarray | None) -> None:
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
    axes.imshow(shade(enlarged, kept), interpolation="nearest")
    axes.set_xlabel(f"{kept.sum()} of {kept.size}", fontsize=6, color=MUTED, labelpad=2)


def _clean(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.5)
        spine.set_color("#c8c8c8")
