"""Boxes written as text: `[x1, y1, x2, y2]`, as shares of the image's width and height."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

IOU_THRESHOLD = 0.5
Box = tuple[float, float, float, float]

_BOX = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")


def box_hit(prediction: str, references: Sequence[str]) -> float:
    """1 if the first box of the answer overlaps a reference box with an IoU of at least 0.5.

    Source: RefCOCO's accuracy (Yu et al., ECCV 2016).
    """
    box = parse_box(prediction)
    wanted = [parsed for parsed in map(parse_box, references) if parsed is not None]
    return float(box is not None and any(iou(box, other) >= IOU_THRESHOLD for other in wanted))


def parse_box(text: str) -> Box | None:
    """The first four numbers in square brackets, or None."""
    match = _BOX.search(text)
    if match is None:
        return None
    left, top, right, bottom = map(float, match.groups())
    return left, top, right, bottom


def format_box(box: Sequence[float]) -> str:
    """`[0.125, 0.25, 0.5, 1]`; `parse_box` gives the very same numbers back."""
    return f"[{', '.join(np.format_float_positional(value, trim='-') for value in box)}]"


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 where a box has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)
