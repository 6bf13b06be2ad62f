"""Metrics of multiple choice: which letter does an answer name?

What the originals would ask another model, or draw at random, is wrong here; names that end in
`_rules` say so.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

EDGE_MARKS = ",.!?;:'\""

# Around a letter, in the order in which MMBench tries them.
_WRAPPINGS = (
    *(("", end) for end in (".", ",", ":", ")", ").")),
    *(("(", end) for end in (")", ").")),
    *((":", end) for end in ("", ",", ".", ")", ").")),
)

# What a letter may look like, and how sure that makes us that it is the answer.
_FORMS = (("(", ")", 6), ("", ".", 5), ("", ":", 4), ("", ")", 3), ("", " ", 2))
_AT_START, _AT_END, _AFTER_PHRASE, _ANYWHERE = 10, 9, 7, 0
_PHRASES = (
    *(
        f"{article}{what} is"
        for article in ("", "the ")
        for what in (
            "answer",
            "correct answer",
            "best answer",
            "correct option",
            "best option",
            "choice",
            "correct choice",
        )
    ),
    "my answer is",
    "my choice is",
    "i choose",
    "i select",
    "i pick",
    "옵션",
    "정답은",
    "답은",
    "답:",
    "答案是",
    "答案为",
    "选",
    "答えは",
)

# Tried in turn, at any place of an answer about one of two pictures.
_MMVP_PATTERNS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"^\(?([AB])\)?\.?$",
        r"^\(?([AB])\)?[.\s]",
        r"answer\s+is\s+\(?([AB])",
        r"option\s+\(?([AB])",
        r"([AB])\)?(?:\s|$)",
    )
)


def scienceqa(prediction: str, references: Sequence[str]) -> float:
    """1 for the reference letter alone, in either case, or as a capital before a period."""
    answer = prediction.strip()
    if answer.lower() not in {reference.lower() for reference in references} and answer[1:2] == ".":
        answer = answer[0] if answer[0].isupper() else ""
    return float(answer.lower() in {reference.strip().lower() for reference in references})


def first_letter(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer begins with the reference letter, in either case. SEED-Bench."""
    letter = prediction.strip()[:1].lower()
    return float(letter in {reference.strip().lower() for reference in references})


def realworldqa(prediction: str, references: Sequence[str]) -> float:
    """A letter where the reference is one of A to D; else equality without case, final periods."""

    def score(reference: str) -> bool:
        reference = reference.strip()
        if reference.upper() in ("A", "B", "C", "D"):
            return find_letter(prediction, "ABCD") == reference.upper()
        return prediction.lower().strip().rstrip(".") == reference.lower()

    return float(any(map(score, references)))


def mmvp(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer names the reference letter of A and B."""
    return float(mmvp_letter(prediction) in references)


def mmvp_letter(prediction: str) -> str:
    """ "A", "B", or "" where none is found."""
    text = prediction.strip()
    for pattern in _MMVP_PATTERNS:
        if match := pattern.search(text):
            return match[1].upper()
    return text[:1].upper() if text[:1].upper() in ("A", "B") else ""


def mmbench_rules(
    prediction: str, references: Sequence[str], *, choices: Mapping[str, str]
) -> float:
    """1 if the rules of MMBench's scorer, by themselves, find the reference letter.

    What they cannot read is wrong here; the original asks GPT, and draws at random after that.

    Args:
        choices: texts of the letters A to D that there are.
    """
    return float(_mmbench_letter(prediction.strip(), choices) in references)


def mmbench_static(
    prediction: str, references: Sequence[str], *, choices: Mapping[str, str]
) -> float:
    """`mmbench_rules`, and `find_letter` for what they cannot read: lmms-eval's static variant."""
    answer = prediction.strip()
    found = _mmbench_letter(answer, choices) or find_letter(answer, sorted(choices))
    return float(found in references)


def _mmbench_letter(answer: str, choices: Mapping[str, str]) -> str:
    return option_letter(answer) or option_text(answer, choices)


def option_letter(answer: str, letters: str = "ABCDE") -> str:
    """The one letter that stands alone among the words, bare or with marks around it; or "".

    A bare "A" in more than three words may be an article, so then no bare letter counts.
    """
    words = answer.split()
    bare = [letter for letter in letters if letter in words]
    if len(bare) == 1 and not ("A" in words and len(words) > 3):
        return bare[0]
    for before, after in _WRAPPINGS:
        found = [letter for letter in letters if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    return ""


def option_text(answer: str, choices: Mapping[str, str]) -> str:
    """The letter of the one choice whose text stands in the answer, without case; or ""."""
    found = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else ""


def find_letter(answer: str, letters: Sequence[str] = string.ascii_uppercase[:8]) -> str:
    """The letter that most looks like the answer, or "".

    At the start, at the end, after words like "the answer is", in brackets, before a mark, before
    a space, anywhere: the first of these that there is counts, and in it the last place.
    """
    text = answer.strip()
    for mark in EDGE_MARKS:
        text = text.strip(mark)
    if not text:
        return ""
    padded, inner = f" {text} ", text.strip()
    found = []  # how sure, where, which
    for letter in letters:
        for before, after, sure in _FORMS:
            place = padded.rfind(f"{before}{letter}{after}")
            found.append((sure, place, letter))
        if inner.startswith(letter) and not inner[1:2].isalpha():
            found.append((_AT_START, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            found.append((_AT_END, len(padded) - 1, letter))
    for phrase in _PHRASES:
        place = padded.lower().find(phrase)
        if place >= 0:
            after = place + len(phrase)
            found += [(_AFTER_PHRASE, padded.find(letter, after), letter) for letter in letters]
    found = [candidate for candidate in found if candidate[1] >= 0]
    if not found:
        found = [(_ANYWHERE, padded.rfind(letter), letter) for letter in letters]
    sure, place, letter = max(found)
    return letter if place >= 0 else ""
