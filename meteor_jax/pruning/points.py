"""Reduction points: the places in a forward pass where a plan may prune tokens.

    encoders.segment2   after the second third of every encoder's blocks, one budget over all
    clip.segment2       the same of one encoder; segment 3 is its end
    clip.block4         between attention and MLP of an encoder's block 4
    fusion              where the encoders' tokens are joined
    decoder.layer8      before layer 8 of the decoder

A model family may have points of its own, of the form `part` or `part.kind<number>`; it refuses a
plan with steps at others (`PrunePlan.check_points`).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

Stage = Literal["encode", "fuse", "decode"]

STAGES: tuple[Stage, ...] = ("encode", "fuse", "decode")
NUM_SEGMENTS = 3  # equal parts of an encoder's depth, at whose ends tokens may be dropped
ENCODERS = "encoders"  # all of them, with one shared budget
FUSION = "fusion"
DECODER = "decoder"


@dataclasses.dataclass(frozen=True)
class Point:
    """A reduction point: `part` of the model, and the number of a `kind` of places in it."""

    part: str
    kind: str = ""
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> Point:
        """Raises ValueError for what is no name of a point."""
        match = re.fullmatch(r"([A-Za-z_]\w*?)(?:\.([a-z]+)(\d+))?", text)
        if not match:
            raise ValueError(
                f"at: expected a reduction point such as {ENCODERS}.segment1, {FUSION} or "
                f"{DECODER}.layer8, got '{text}'."
            )
        return cls(match[1], match[2] or "", int(match[3] or 0))

    def __str__(self) -> str:
        return f"{self.part}.{self.kind}{self.index}" if self.kind else self.part

    @property
    def stage(self) -> Stage:
        """The part of a plan that the point belongs to, by which plan texts name its fields."""
        if self.part == FUSION:
            return "fuse"
        return "decode" if self.part == DECODER else "encode"


def after_segment(number: int, *, of: str = ENCODERS) -> str:
    """The point after a third of the blocks of one encoder, or of all of them."""
    return str(Point(of, "segment", number))


def inside_block(index: int, *, of: str) -> str:
    """The point between attention and MLP of a block."""
    return str(Point(of, "block", index))


def before_layer(index: int) -> str:
    """The point before a layer of the decoder."""
    return str(Point(DECODER, "layer", index))
