"""The answer normaliser of the VQA challenges, and soft accuracy over ten answers.

Source: VQA's evaluation (Antol et al., ICCV 2015), in the form that lmms-eval runs for TextVQA,
VizWiz and VQAv2, with its peculiarities, since published numbers have them too.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
MAX_PERIODS = 32  # so many at most are dropped; the original means a flag of this value

# Written right; a word that lacks exactly one of the apostrophes is put right.
_RIGHT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[: apostrophe.start()] + word[apostrophe.end() :]: word
    for word in _RIGHT.split()
    for apostrophe in re.finditer("'", word)
}

_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")


@functools.lru_cache(maxsize=1 << 16)
def normalise(text: str) -> str:
    """Case, punctuation, number words, articles and contractions evened out.

    >>> normalise("The two dogs, isnt it?")
    "2 dogs isn't it"
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return fix_words(drop_punctuation(one_line(text)))


@functools.lru_cache(maxsize=1 << 16)
def normalise_vqav2(text: str) -> str:
    """The same without its first step, as VQAv2 has it: commas and "'s" are still there."""
    return fix_words(drop_punctuation(one_line(text)))


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def drop_punctuation(text: str) -> str:
    """A mark that stands next to a space anywhere is dropped, any other becomes a space.

    Where a number has a comma in it, all marks are dropped. Periods go unless a digit follows.
    """
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or in_number else " ")
    return _PERIOD.sub("", out, count=MAX_PERIODS)


def fix_words(text: str) -> str:
    """Number words up to ten become digits, articles go, contractions get their apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(
    prediction: str, references: Sequence[str], *, normaliser: Callable[[str], str] = normalise
) -> float:
    """Soft accuracy: over all ways to leave one answer out, min(1, equal ones among the rest / 3).

    0 where there are no answers.
    """
    if not references:
        return 0.0
    answer = normaliser(prediction)
    equal = [normaliser(reference) == answer for reference in references]
    total = sum(equal)
    return math.fsum(min(1.0, (total - own) / 3) for own in equal) / len(references)


def vqav2_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Soft accuracy under VQAv2's normaliser.

    As lmms-eval 0.7 has it, all answers are normalised. VQA's own scorer leaves those alone on
    which all annotators agree.
    """
    return vqa_accuracy(prediction, references, normaliser=normalise_vqav2)
