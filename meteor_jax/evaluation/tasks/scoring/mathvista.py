"""MathVista by rules alone.

Source: MathVista's evaluation (Lu et al., ICLR 2024). The original asks GPT for what its first
rules cannot extract; here the answer itself, or the letter that it begins with, stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

_LETTER_IN_BRACKETS = re.compile(r"\(([a-zA-Z])\)")
_LETTER_FIRST = re.compile(r"([A-Z])[.):]")


def mathvista_rules(
    prediction: str,
    references: Sequence[str],
    *,
    choices: Sequence[str] = (),
    answer_type: str = "text",
    precision: int = 0,
) -> float:
    """1 if the extracted answer is the reference text.

    Args:
        choices: texts of the options; none for a free answer.
        answer_type: "text", "integer", "float" or "list" of a free answer.
        precision: decimals of a float. (lmms-eval 0.7 rounds to the column's float, which fails,
            so no float is right there.)
    """
    answer = prediction.strip()
    if choices:
        found = choose(answer, choices)
    else:
        found = normalise(answer, answer_type=answer_type, precision=precision)
    return float(found is not None and found.strip() in map(str.strip, references))


def choose(answer: str, choices: Sequence[str]) -> str:
    """The option that is meant: by its letter, else the one that is nearest by edit distance."""
    if match := _LETTER_IN_BRACKETS.search(answer) or _LETTER_FIRST.match(answer):
        answer = match[1].upper()
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    if answer in letters:
        return choices[letters.index(answer)]
    return _nearest(answer, choices)


def normalise(answer: str, *, answer_type: str, precision: int = 0) -> str | None:
    """A free answer as MathVista writes it; None where it is no such number."""
    try:
        if answer_type == "integer":
            return str(int(float(answer)))
        if answer_type == "float":
            return str(round(float(answer), precision))
    except (ValueError, OverflowError):
        return None
    return answer


def _nearest(answer: str, choices: Sequence[str]) -> str:
    return min(choices, key=lambda choice: Levenshtein.distance(answer, choice))
