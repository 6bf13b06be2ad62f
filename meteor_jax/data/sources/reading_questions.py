"""Questions, answers and the caption of a generated picture, from the elements in it.

No question gives its own answer away, and none that of another question in the same picture (they
are turns of one conversation in training): names in yes/no questions are drawn alike for both
answers, each thing is asked about once a task, and relations are asked in one order only.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

from meteor_jax.data.sources.reading_canvas import BAR_LETTERS, COLORS, SHAPES, Element

Question = tuple[str, str, str]  # task, question, answer

ORDINALS = ("first", "second", "third", "fourth")


def caption(rng: random.Random, elements: Sequence[Element], side: int) -> str:
    """Everything in the picture with its place, in random order.

    In reading order it would be enough to go on from where one is; in random order what follows a
    key, a bar's letter or a shape's name has to be looked up by it, as questions want it.
    """
    shuffled = rng.sample(elements, len(elements))
    return "; ".join(
        f"{_describe(rng, element)} at {place_name(element, side)}" for element in shuffled
    )


def place_name(element: Element, side: int) -> str:
    """The cell of a 3×3 grid in which the element's centre lies: 'top left' … 'center'."""
    x, y = (_third(value, side) for value in element.center)
    names = (("top", "", "bottom")[y], ("left", "", "right")[x])
    return " ".join(filter(None, names)) or "center"


def ask(
    rng: random.Random,
    elements: Sequence[Element],
    *,
    side: int,
    keys: Sequence[str],
    words: Sequence[str],
    counts: dict[str, int],
) -> list[Question]:
    """Up to `counts[task]` different questions of each task, as the content allows."""
    makers: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "reading_attribute": lambda: _attributes(rng, elements, side),
        "reading_existence": lambda: _existence(rng, elements, keys, words),
        "reading_count": lambda: _counts(elements),
        "reading_relation": lambda: _relations(rng, elements),
        "reading_digits": lambda: [
            ("what are the digits?", element.content) for element in _of(elements, "digits")
        ],
        "reading_digit": lambda: [
            (f"what is the {ORDINALS[i]} digit?", digit)
            for element in _of(elements, "digits")
            for i, digit in enumerate(element.content)
        ],
        "reading_word": lambda: [
            ("what is the word?", element.content) for element in _of(elements, "word")
        ],
        "reading_keyvalue": lambda: _key_values(rng, elements),
        "reading_chart": lambda: _bars(elements),
    }
    asked = []
    for task, wanted in counts.items():
        options = makers[task]()
        chosen = rng.sample(options, min(wanted, len(options)))
        asked += [(task, question, answer) for question, answer in chosen]
    rng.shuffle(asked)
    return asked


def _describe(rng: random.Random, element: Element) -> str:
    if element.is_shape:
        return element.name
    if element.kind == "list":
        lines = rng.sample(element.content, len(element.content))
        return f"{element.color} list " + ", ".join(f"{key}: {value}" for key, value in lines)
    if element.kind == "chart":
        bars = rng.sample(element.content, len(element.content))
        return "chart " + ", ".join(f"{letter} {color} {value}" for letter, value, color in bars)
    return " ".join(filter(None, (element.color, element.kind, element.content)))


def _third(value: float, side: int) -> int:
    return min(int(3 * value / side), 2)


def _of(elements: Sequence[Element], kind: str) -> list[Element]:
    return [element for element in elements if element.kind == kind]


def _shapes(elements: Sequence[Element]) -> list[Element]:
    return [element for element in elements if element.is_shape]


def _attributes(
    rng: random.Random, elements: Sequence[Element], side: int
) -> list[tuple[str, str]]:
    shapes = _shapes(elements)
    kinds = [shape.kind for shape in shapes]
    colors = [shape.color for shape in shapes]
    places = [place_name(shape, side) for shape in shapes]
    options = []
    for shape, place in zip(shapes, places, strict=True):
        unique = []
        if kinds.count(shape.kind) == 1:
            unique.append((f"what color is the {shape.kind}?", shape.color))
        if colors.count(shape.color) == 1:
            unique.append((f"what shape is {shape.color}?", shape.kind))
        if places.count(place) == 1:
            unique.append((f"what shape is at {place}?", shape.kind))
        if unique:
            options.append(rng.choice(unique))
    for element in _of(elements, "word") + _of(elements, "list"):
        options.append((f"what color is the {element.kind}?", element.color))
    for chart in _of(elements, "chart"):
        options += [(f"what color is bar {a}?", color) for a, _, color in chart.content]
    return options


def _existence(
    rng: random.Random, elements: Sequence[Element], keys: Sequence[str], words: Sequence[str]
) -> list[tuple[str, str]]:
    """The toss of a coin for everything that can be asked about; no question comes twice."""
    pools: list[tuple[str, list[str], Sequence[str]]] = []
    shapes = sorted({shape.name for shape in _shapes(elements)})
    if shapes:
        # The absent one shares a word with a present one, so that both words have to be seen.
        color, kind = rng.choice(shapes).split()
        near = [f"{other} {kind}" for other in COLORS] + [f"{color} {other}" for other in SHAPES]
        pools.append(("is there a {}?", shapes, sorted(set(near))))
    for element in elements:
        if element.kind == "word":
            pools.append(("is the word {}?", [element.content], words))
        elif element.kind == "digits":
            pools.append(("is there a digit {}?", sorted(set(element.content)), "0123456789"))
        elif element.kind == "list":
            pools.append(("is {} on the list?", [key for key, _ in element.content], keys))
        elif element.kind == "chart":
            letters = [letter for letter, _, _ in element.content]
            pools.append(("is there a bar {}?", letters, BAR_LETTERS))
    options = []
    for question, present, universe in pools:
        # Two more than are present, so that two at least are absent.
        drawn = rng.sample(universe, min(len(present) + 2, len(universe)))
        names = {
            "yes": rng.sample(present, len(present)),
            "no": [name for name in drawn if name not in present],
        }
        # A second toss only where it cannot run out of names: that would tip the balance.
        for _ in range(2 if len(pools) == 1 and len(present) > 1 else 1):
            answer = rng.choice(("yes", "no"))
            asked = question.format(names[answer].pop()).replace(" a orange", " an orange")
            options.append((asked, answer))
    return options


def _counts(elements: Sequence[Element]) -> list[tuple[str, str]]:
    options: dict[str, int] = {}
    shapes = _shapes(elements)
    if shapes:
        options["how many shapes are there?"] = len(shapes)
        for shape in shapes:
            options[f"how many shapes are {shape.color}?"] = sum(
                other.color == shape.color for other in shapes
            )
            plural = f"{shape.kind}es" if shape.kind.endswith("s") else f"{shape.kind}s"
            options[f"how many {plural} are there?"] = sum(
                other.kind == shape.kind for other in shapes
            )
    for kind, question in (
        ("digits", "how many digits are there?"),
        ("word", "how many letters has the word?"),
        ("list", "how many lines has the list?"),
        ("chart", "how many bars are there?"),
    ):
        for element in _of(elements, kind):
            options[question] = len(element.content)
    # A count of one says little: keep at most one such question among the options.
    ones = [question for question, number in options.items() if number == 1]
    for question in ones[1:]:
        del options[question]
    return [(question, str(number)) for question, number in options.items()]


def _relations(rng: random.Random, elements: Sequence[Element]) -> list[tuple[str, str]]:
    """Where one thing is from another, for pairs that lie clearly one way apart."""
    options = []
    names = [element.name for element in elements]
    named_once = [element for element in elements if names.count(element.name) == 1]
    for pair in itertools.combinations(named_once, 2):
        one, other = rng.sample(pair, 2)
        side = _side(one, other)
        if side is None:
            continue
        if len(elements) == 2 and rng.random() < 0.5:
            # With nothing else in the picture there is one answer to what lies on that side.
            preposition = {"left": "left of", "right": "right of"}.get(side, side)
            options.append((f"what is {preposition} the {other.name}?", one.name))
        else:
            verb = "are" if one.kind == "digits" else "is"
            options.append((f"where {verb} the {one.name} relative to the {other.name}?", side))
    return options


def _side(one: Element, other: Element) -> str | None:
    """On which side of `other` lies `one`; None where neither axis clearly decides it."""
    (ax, ay), (bx, by) = one.center, other.center
    apart_x = one.box[2] <= other.box[0] or one.box[0] >= other.box[2]
    apart_y = one.box[3] <= other.box[1] or one.box[1] >= other.box[3]
    if apart_y and (not apart_x or abs(ay - by) > 1.5 * abs(ax - bx)):
        return "above" if ay < by else "below"
    if apart_x and (not apart_y or abs(ax - bx) > 1.5 * abs(ay - by)):
        return "left" if ax < bx else "right"
    return None


def _key_values(rng: random.Random, elements: Sequence[Element]) -> list[tuple[str, str]]:
    options = []
    for element in _of(elements, "list"):
        for key, value in element.content:
            if rng.random() < 0.75:
                options.append((f"what is the value of {key}?", value))
            else:
                options.append((f"what has the value {value}?", key))
    return options


def _bars(elements: Sequence[Element]) -> list[tuple[str, str]]:
    options = []
    for element in _of(elements, "chart"):
        for letter, value, _ in element.content:
            options.append((f"what is the value of bar {letter}?", str(value)))
    return options
