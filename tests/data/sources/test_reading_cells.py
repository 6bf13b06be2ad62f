"""Where a picture's glyphs, shapes and bars lie."""

import numpy as np
import pytest

from meteor_jax.data.sources import reading
from meteor_jax.data.sources.reading_canvas import COLORS, Element, Part
from meteor_jax.data.sources.reading_cells import (
    CLASSES,
    COLOR_CLASSES,
    GROUPS,
    NOTHING,
    label_cells,
)

PICTURES = [reading.make_picture(i, split="test") for i in range(20)]


def names(element):
    return "".join(part.name for part in element.parts)


@pytest.mark.parametrize("number", range(len(PICTURES)))
def test_parts_are_what_an_element_says_and_lie_in_it(number):
    for element in PICTURES[number].elements:
        if element.kind in ("word", "digits"):
            assert names(element) == element.content
        elif element.kind == "list":
            assert names(element) == "".join(f"{key}:{value}" for key, value in element.content)
        elif element.kind == "chart":
            assert names(element) == "".join(f"bar {v}{a}" for a, v, _ in element.content)
        else:
            assert names(element) == element.kind
        left, top, right, bottom = element.box
        for part in element.parts:
            x0, y0, x1, y1 = part.box
            assert x0 < x1 and y0 < y1
            assert left - 2 <= x0 and x1 <= right + 2 and top <= y0 and y1 <= bottom + 2


@pytest.mark.parametrize("make", [reading.make_picture, reading.make_page])
def test_what_is_painted_lies_in_the_parts(make):
    for index in (0, 2, 4, 5, 6):  # no lists and charts, which have colons and axes
        picture = make(index, split="test")
        pixels = np.asarray(picture.image).astype(int)
        painted = (np.abs(pixels - pixels[0, 0]) > 60).any(-1)
        covered = np.zeros_like(painted)
        for element in picture.elements:
            for part in element.parts:
                left, top, right, bottom = part.box
                covered[max(top, 0) : bottom, max(left, 0) : right] = True
        assert painted.sum() > 100
        assert (painted & covered).sum() >= 0.98 * painted.sum()


def test_letters_stand_in_their_order():
    for picture in PICTURES:
        for element in picture.elements:
            if element.kind == "word":
                lefts = [part.box[0] for part in element.parts]
                assert lefts == sorted(lefts) and len(set(lefts)) == len(lefts)


def test_a_cell_belongs_to_the_part_that_its_centre_lies_in():
    # Centres of cells of 4 pixels lie at 2, 6, 10, …; a box has its first pixel, not its last.
    bar = Part("bar 9", (11, 0, 40, 4), "blue")
    parts = (Part("7", (2, 3, 10, 7)), Part(":", (12, 12, 16, 16)), bar)
    element = Element("digits", "", "7", (0, 0, 16, 16), parts)
    classes, colors = label_cells([element], side=16, cell=4)
    wanted = np.full((4, 4), NOTHING)
    wanted[1, 0:2] = CLASSES.index("7")
    wanted[0, 3] = CLASSES.index("bar 9")
    np.testing.assert_array_equal(classes, wanted)
    wanted = np.full((4, 4), NOTHING)
    wanted[0, 3] = COLOR_CLASSES.index("blue")
    np.testing.assert_array_equal(colors, wanted)


def test_a_cell_has_the_colour_of_its_pixels():
    seen = set()
    for picture in PICTURES:
        classes, colors = label_cells(picture.elements, side=96, cell=4)
        pixels = np.asarray(picture.image)
        for y, x in np.argwhere(np.isin(classes, GROUPS["bars"])):
            middle = pixels[4 * y + 2, 4 * x + 2]
            name = COLOR_CLASSES[colors[y, x]]
            np.testing.assert_array_equal(middle, COLORS[name])
            seen.add(name)
        digits = np.isin(classes, GROUPS["digits"]) & (colors != NOTHING)
        lists = any(element.kind == "list" for element in picture.elements)
        assert lists or not digits.any()  # handwriting is black
    assert len(seen) > 3


def test_every_class_but_nothing_is_of_one_group():
    numbers = sorted(number for group in GROUPS.values() for number in group)
    assert numbers == list(range(1, len(CLASSES)))
    assert [CLASSES[GROUPS[group][0]] for group in GROUPS] == ["0", "a", "A", "circle", "bar 1"]


def test_a_page_is_full():
    for index in range(10):
        page = reading.make_page(index, split="train")
        assert sum(len(element.parts) for element in page.elements) >= 10
        assert (label_cells(page.elements, side=96, cell=4)[0] != NOTHING).mean() > 0.4
        assert page.questions == ()
        again = reading.make_page(index, split="train")
        assert again.image.tobytes() == page.image.tobytes()
