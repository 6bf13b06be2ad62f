"""What lies where in a picture of the reading set, and in which colour, by small squares of it."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from meteor_jax.data.sources.reading_canvas import BAR_LETTERS, COLORS, SHAPES, Element

NOTHING = 0
CLASSES = (
    "nothing",
    *string.digits,
    *string.ascii_lowercase,
    *BAR_LETTERS,
    *SHAPES,
    *(f"bar {value}" for value in range(1, 10)),
)
GROUPS = {  # the numbers of the classes of a kind
    "digits": range(1, 11),
    "letters": range(11, 37),
    "capitals": range(37, 45),
    "shapes": range(45, 50),
    "bars": range(50, 59),
}
COLOR_CLASSES = ("nothing or black", *COLORS)
_NUMBERS = {name: number for number, name in enumerate(CLASSES)}
_COLOR_NUMBERS = {name: number for number, name in enumerate(COLOR_CLASSES)}


def label_cells(
    elements: Sequence[Element], *, side: int, cell: int
) -> tuple[np.ndarray, np.ndarray]:
    """The part in whose box each cell's centre lies, and that part's colour.

    Args:
        side: of the picture, in pixels.
        cell: side of a square, in pixels; C = side / cell.

    Returns:
        Numbers of `CLASSES` and of `COLOR_CLASSES`: two arrays uint8[C, C].
    """
    classes = np.full((side // cell,) * 2, NOTHING, np.uint8)
    colors = np.full_like(classes, NOTHING)
    for element in elements:
        for part in element.parts:
            if part.name in _NUMBERS:  # not the colon after a key
                # Centres are at (i + 1/2) cells: the first i at or past the edge is rounded up.
                left, top, right, bottom = (-(-(2 * v - cell) // (2 * cell)) for v in part.box)
                inside = np.s_[max(top, 0) : bottom, max(left, 0) : right]
                classes[inside] = _NUMBERS[part.name]
                colors[inside] = _COLOR_NUMBERS[part.color] if part.color else NOTHING
    return classes, colors
