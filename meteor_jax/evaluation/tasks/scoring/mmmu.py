"""MMMU's parser: which option an answer names, or whether an open answer holds the reference one.

Source: MMMU's evaluation (Yue et al., CVPR 2024) as lmms-eval 0.7 runs it. Where that draws an
option at random, nothing is found here, so the answer is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

EDGE_MARKS = ",.!?;:'"
MANY_WORDS = 5  # in a longer answer, an option's text counts as its letter

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def multiple_choice(
    prediction: str, references: Sequence[str], *, choices: Mapping[str, str]
) -> float:
    """1 if the answer names the reference letter.

    Args:
        choices: texts by letter.
    """
    return float(parse_choice(prediction, choices) in references)


def open_question(prediction: str, references: Sequence[str]) -> float:
    """1 if a key part of the answer has a reference text in it, or is a reference number to two
    places."""
    wanted = [value for reference in references for value in normalise(reference)]
    texts = [value for value in wanted if isinstance(value, str)]
    for value in parse_open(prediction):
        if isinstance(value, str):
            if any(text in value for text in texts):
                return 1.0
        elif value in wanted:
            return 1.0
    return 0.0


def parse_choice(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that is named last: as "(A)", else before a space, else before a period; or the
    option whose text comes last, in a long answer without a letter. None where there is none."""
    for mark in EDGE_MARKS:
        answer = answer.strip(mark)
    answer = f" {answer} "
    # How a letter is found, and how its last place is; they differ, as in the original.
    for found_as, placed_as in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in choices if found_as.format(letter) in answer]
        if found:
            return max(found, key=lambda letter: answer.rfind(placed_as.format(letter)))
    if len(answer.split()) > MANY_WORDS:
        lower = answer.lower()
        found = [letter for letter, text in choices.items() if text.lower() in lower]
        if found:
            return max(found, key=lambda letter: lower.rfind(choices[letter].lower()))
    return None


def parse_open(answer: str) -> list[str | float]:
    """What an open answer may mean: the ends of its lines after words like "is", and all numbers
    in those; the whole answer where no line has such a word."""
    answer = answer.strip().strip(".").lower()
    lines = answer.split("\n")
    parts = []
    for index, line in enumerate(lines):
        indicators = (*_INDICATORS, "=") if index == len(lines) - 1 else _INDICATORS
        ends = [line.split(mark)[-1].strip() for mark in indicators if mark in line]
        shortest = _shortest(ends)
        if shortest and shortest not in tuple(EDGE_MARKS):
            parts.append(shortest)
    parts = parts or [answer]
    numbers = [number for part in parts for number in find_numbers(part)]
    return [value for part in (*parts, *numbers) for value in normalise(part)]


def _shortest(ends: Sequence[str]) -> str:
    """The first of the shortest, except that an empty one gives way to what follows it."""
    shortest = ""
    for end in ends:
        if not shortest or len(end) < len(shortest):
            shortest = end
    return shortest


def find_numbers(text: str) -> list[str]:
    """Numbers with commas, in scientific notation, and plain ones."""
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def normalise(text: str) -> list[str | float]:
    """A number to two places, or the text in lower case.

    A single letter gets a space before or after it, lest it be found in every word.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
