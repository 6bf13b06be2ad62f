"""Drawing for the reading set: glyphs, shapes and bars as cached masks, put together in blocks.

A block is a piece of a picture that is laid out as one (a word, a row of shapes, a chart). It says
what it paints and which elements a question can be asked about, relative to its own corner.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "red": (215, 25, 30),
    "green": (25, 150, 50),
    "blue": (30, 70, 220),
    "orange": (245, 140, 0),
    "purple": (150, 40, 190),
    "gray": (120, 120, 120),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
BAR_LETTERS = "ABCDEFGH"
BLACK = (20, 20, 20)
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono-Bold")
MAX_TURN = 8  # degrees, of a handwritten digit
DIGIT_SIDE = 24  # pixels to which samples are enlarged before they are turned
TEST_SHARE = 5  # one handwritten sample in five is kept for the test split
BAR_UNIT = 5  # pixels of height for each one of a bar's value
BAR_PITCH = 15

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclasses.dataclass(frozen=True)
class Part:
    """The least that is seen as one thing: a glyph, a shape, a bar with its value ('bar 7').

    color: one of COLORS; empty for what is black.
    """

    name: str
    box: Box
    color: str = ""


@dataclasses.dataclass(frozen=True)
class Element:
    """Something that a question can name.

    kind: a shape's name, or word, digits, list or chart. content: the word; the digits; for a list
    (key, value) pairs; for a chart (letter, value, colour) triples; nothing for a shape.
    """

    kind: str
    color: str
    content: Any
    box: Box
    parts: tuple[Part, ...]

    @property
    def is_shape(self) -> bool:
        return self.kind in SHAPES

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}" if self.is_shape else self.kind

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclasses.dataclass(frozen=True)
class Ink:
    """One stroke of paint: a mask, or a full rectangle where `mask` is a size."""

    mask: Image.Image | tuple[int, int]
    color: tuple[int, int, int]
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Block:
    width: int
    height: int
    inks: tuple[Ink, ...]
    elements: tuple[Element, ...]


def place(canvas: Image.Image, block: Block, x: int, y: int) -> list[Element]:
    """Paints the block with its corner at (x, y); its elements, in the canvas's pixels."""
    for ink in block.inks:
        left, top = x + ink.x, y + ink.y
        if isinstance(ink.mask, tuple):
            canvas.paste(ink.color, (left, top, left + ink.mask[0], top + ink.mask[1]))
        else:
            canvas.paste(ink.color, (left, top), ink.mask)
    return [_moved(element, x, y) for element in block.elements]


def _moved(element: Element, x: int, y: int) -> Element:
    parts = tuple(dataclasses.replace(p, box=_shift(p.box, x, y)) for p in element.parts)
    box = _shift(element.box, x, y)
    return Element(element.kind, element.color, element.content, box, parts)


def _shift(box: Box, x: int, y: int) -> Box:
    left, top, right, bottom = box
    return (left + x, top + y, right + x, bottom + y)


def shape_block(kind: str, color: str, size: int) -> Block:
    box = (0, 0, size, size)
    element = Element(kind, color, "", box, (Part(kind, box, color),))
    return Block(size, size, (Ink(shape_mask(kind, size), COLORS[color], 0, 0),), (element,))


def row_block(rng: random.Random, blocks: list[Block], *, max_width: int) -> Block:
    """Blocks side by side, with random gaps and a little up and down."""
    height = max(block.height for block in blocks) + 4
    spare = max_width - sum(block.width for block in blocks)
    gap = min(spare // max(len(blocks) - 1, 1), rng.randint(6, 12))
    inks, elements, x = [], [], 0
    for block in blocks:
        y = rng.randint(0, height - block.height)
        inks += [Ink(ink.mask, ink.color, ink.x + x, ink.y + y) for ink in block.inks]
        elements += [_moved(element, x, y) for element in block.elements]
        x += block.width + gap
    return Block(x - gap, height, tuple(inks), tuple(elements))


def word_block(rng: random.Random, word: str, color: str) -> Block:
    return text_block(rng, word, color, size=rng.randint(18, 22))


def text_block(
    rng: random.Random, word: str, color: str, *, size: int, max_width: int | None = None
) -> Block:
    """As many of the letters as `max_width` has room for."""
    font = rng.choice(FONTS)
    while max_width and text_mask(word, font, size).width > max_width:
        word = word[:-1]
    mask = text_mask(word, font, size)
    parts = text_parts(word, font, size, color=color)
    element = Element("word", color, word, (0, 0, *mask.size), parts)
    return Block(*mask.size, (Ink(mask, COLORS[color], 0, 0),), (element,))


def digits_block(rng: random.Random, digits: str, *, split: str) -> Block:
    """Handwritten digits in a row; every one is a real sample of the split's own."""
    size, gap, samples = rng.randint(18, 21), rng.randint(0, 2), digit_samples(split)
    shade = rng.randint(0, 60)
    ink = (shade, shade, shade)
    inks = tuple(
        Ink(
            digit_mask(rng.choice(samples[int(digit)]), size, rng.uniform(-MAX_TURN, MAX_TURN)),
            ink,
            i * (size + gap),
            rng.randint(0, 2),
        )
        for i, digit in enumerate(digits)
    )
    parts = tuple(
        Part(digit, (stroke.x, stroke.y, stroke.x + size, stroke.y + size))
        for digit, stroke in zip(digits, inks, strict=True)
    )
    width, height = len(digits) * (size + gap) - gap, size + 2
    element = Element("digits", "", digits, (0, 0, width, height), parts)
    return Block(width, height, inks, (element,))


def list_block(
    rng: random.Random, lines: tuple[tuple[str, str], ...], color: str, *, max_width: int
) -> Block:
    """Lines of 'key: value', as large as the width allows."""
    font = rng.choice(FONTS)
    size = 15 if len(lines) <= 3 else 13
    pitch = size + 3
    while True:
        # Keys and values apart, so that their masks are drawn once and used again.
        masks = [(text_mask(f"{k}:", font, size), text_mask(v, font, size)) for k, v in lines]
        width = max(key.width + size // 2 + value.width for key, value in masks)
        if width <= max_width:
            break
        size -= 1
    inks, parts = [], []
    for i, (key, value) in enumerate(masks):
        x, y = key.width + size // 2, i * pitch
        inks += [Ink(key, COLORS[color], 0, y), Ink(value, COLORS[color], x, y)]
        parts += text_parts(f"{lines[i][0]}:", font, size, y=y, color=color)
        parts += text_parts(lines[i][1], font, size, x=x, y=y, color=color)
    height = (len(lines) - 1) * pitch + masks[-1][0].height
    element = Element("list", color, lines, (0, 0, width, height), tuple(parts))
    return Block(width, height, tuple(inks), (element,))


def chart_block(bars: tuple[tuple[str, int, str], ...]) -> Block:
    """Bars of (letter, value, colour) over an axis whose ticks are one apart."""
    left, floor = 5, 9 * BAR_UNIT
    width, height = left + len(bars) * BAR_PITCH, floor + 14
    inks = [
        Ink((width - left, 1), (205, 205, 205), left, floor - value * BAR_UNIT)
        for value in (3, 6, 9)
    ]
    inks += [Ink((3, 1), BLACK, 1, floor - value * BAR_UNIT) for value in range(1, 10)]
    inks += [Ink((1, floor + 1), BLACK, left - 1, 0), Ink((width - left, 1), BLACK, left, floor)]
    parts = []
    for i, (letter, value, color) in enumerate(bars):
        x, tall = left + 2 + i * BAR_PITCH, value * BAR_UNIT
        label = text_mask(letter, "DejaVuSans-Bold", 12)
        letter_x = x + (BAR_PITCH - 4 - label.width) // 2
        inks.append(Ink((BAR_PITCH - 4, tall), COLORS[color], x, floor - tall))
        inks.append(Ink(label, BLACK, letter_x, floor + 3))
        parts.append(Part(f"bar {value}", (x, floor - tall, x + BAR_PITCH - 4, floor), color))
        parts += text_parts(letter, "DejaVuSans-Bold", 12, x=letter_x, y=floor + 3)
    element = Element("chart", "", bars, (0, 0, width, height), tuple(parts))
    return Block(width, height, tuple(inks), (element,))


@functools.cache
def shape_mask(kind: str, size: int) -> Image.Image:
    """The shape in white on black, drawn four times too large for smooth edges."""
    big = 4 * size
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    if kind == "circle":
        draw.ellipse((0, 0, big - 1, big - 1), fill=255)
    elif kind == "square":
        draw.rectangle((big // 12, big // 12, big - big // 12, big - big // 12), fill=255)
    elif kind == "triangle":
        draw.polygon([(big / 2, 0), (big, big), (0, big)], fill=255)
    elif kind == "cross":
        arm = big // 3
        draw.rectangle((arm, 0, 2 * arm, big), fill=255)
        draw.rectangle((0, arm, big, 2 * arm), fill=255)
    else:  # star
        points = []
        for i in range(10):
            radius, angle = big / 2 * (1 if i % 2 == 0 else 0.42), math.pi * (i / 5 - 0.5)
            points.append((big / 2 + radius * math.cos(angle), big / 2 + radius * math.sin(angle)))
        draw.polygon(points, fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


@functools.cache
def text_mask(text: str, font: str, size: int) -> Image.Image:
    """The text's pixels, cut to their width; the height is the font's, so that lines line up."""
    rise, fall = round(size * 0.8), round(size * 0.25)
    mask = Image.new("L", (len(text) * size + 4, rise + fall))
    ImageDraw.Draw(mask).text((2, rise), text, font=_font(font, size), fill=255, anchor="ls")
    left, _, right, _ = mask.getbbox() or (0, 0, 0, 0)
    return mask.crop((left, 0, right, rise + fall))


def text_parts(
    text: str, font: str, size: int, *, x: int = 0, y: int = 0, color: str = ""
) -> tuple[Part, ...]:
    """The letters of `text_mask` with its corner at (x, y): each from where the last one ends."""
    height, edges = text_mask(text, font, size).height, _letter_edges(text, font, size)
    return tuple(
        Part(letter, (x + left, y, x + right, y + height), color)
        for letter, left, right in zip(text, edges[:-1], edges[1:], strict=True)
    )


@functools.cache
def _letter_edges(text: str, font: str, size: int) -> tuple[int, ...]:
    start = _font(font, size).getbbox(text, anchor="ls")[0]
    ends = (_font(font, size).getlength(text[:end]) for end in range(len(text) + 1))
    return tuple(round(end - start) for end in ends)


@functools.cache
def digit_samples(split: str) -> tuple[tuple[int, ...], ...]:
    """By digit, the rows of scikit-learn's handwritten digits that belong to the split."""
    labels = _load_digits().target
    in_test = np.arange(len(labels)) % TEST_SHARE == 0
    mine = in_test if split == "test" else ~in_test
    return tuple(tuple(np.flatnonzero((labels == digit) & mine).tolist()) for digit in range(10))


def digit_mask(sample: int, size: int, degrees: float) -> Image.Image:
    """One handwritten sample, scaled to `size` and turned around its middle."""
    scale, angle = DIGIT_SIDE / size, math.radians(degrees)
    cos, sin, middle = math.cos(angle) * scale, math.sin(angle) * scale, (size - 1) / 2
    shift = (DIGIT_SIDE - 1) / 2
    matrix = (
        *(cos, -sin, shift - middle * (cos - sin)),
        *(sin, cos, shift - middle * (sin + cos)),
    )
    return _digit_images()[sample].transform(
        (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )


def _load_digits() -> Any:
    from sklearn.datasets import load_digits  # slower to import than all of the rest together

    return load_digits()


@functools.cache
def _digit_images() -> tuple[Image.Image, ...]:
    """The 8×8 samples (16 grays) enlarged, their soft edges drawn tighter around the strokes."""
    enlarged = []
    for pixels in _load_digits().images:
        small = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        big = np.asarray(small.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC))
        sharp = np.clip((big.astype(np.float32) - 80) * 2, 0, 255)
        enlarged.append(Image.fromarray(sharp.astype(np.uint8)))
    return tuple(enlarged)


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    # The basic layout is in every Pillow, and joins no letters ("fi").
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
