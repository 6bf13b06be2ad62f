"""Metrics of short free answers; each agrees with what lmms-eval 0.7 says of the same answer.

Every function is `(prediction, references, …) -> float in [0, 1]`; with several references the best
counts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
YES_WINDOW = 4  # characters in which MME looks for a yes or no

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}
_LETTER_FIRST = re.compile(r"\s*([A-Z])\.")


def exact_match_strict(prediction: str, references: Sequence[str]) -> float:
    """1 if the answers are equal without case and ASCII punctuation; spaces count.

    Source: `exact_match` of Hugging Face evaluate with both ignore flags. GQA.
    """

    def plain(text: str) -> str:
        return text.lower().translate(_NO_PUNCTUATION)

    return float(plain(prediction) in map(plain, references))


def ai2d(prediction: str, references: Sequence[str]) -> float:
    """`exact_match_strict`, where "B. some text" reads as "B"."""
    match = _LETTER_FIRST.match(prediction)
    return exact_match_strict(match[1] if match else prediction, references)


def anls_of_documents(prediction: str, references: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest reference, 0 where it is below one half.

    Distance after lower-casing and squeezing spaces, by the longer of the lengths before that.
    Source: DocVQA (Biten et al., ICCV 2019). The copy that EAGLE carries turns every nonzero
    similarity into 1; here the similarity itself is the score.
    """
    best = 0.0
    for reference in references:
        longest = max(len(reference.upper()), len(prediction.upper()))
        distance = Levenshtein.distance(_squeeze(reference), _squeeze(prediction))
        best = max(best, 1.0 - distance / longest if longest else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_chartqa(prediction: str, references: Sequence[str]) -> float:
    """1 if a number is within 5 % of the reference, or the texts are equal without case.

    "12%" reads as 0.12. Where the reference is 0 or either is no number, the texts must be equal,
    spaces included. Source: ChartQA (Masry et al., 2022).
    """

    def score(reference: str) -> bool:
        answer, target = _number(prediction), _number(reference)
        if answer is None or not target:
            return prediction.lower() == reference.lower()
        return abs(answer - target) / abs(target) <= RELAXED_TOLERANCE

    return float(any(map(score, references)))


def ocrbench(prediction: str, references: Sequence[str], *, dataset: str) -> float:
    """1 if a reference stands somewhere in the answer.

    Without case, with line ends as spaces and full-width letters as plain ones; but for HME100k
    (handwritten mathematics) as written, without any space. EAGLE's copy lower-cases the answer
    there and not the reference, so a capital can never be right; here it can.
    """

    def plain(text: str) -> str:
        if dataset == "HME100k":
            return text.strip().replace("\n", " ").replace(" ", "")
        return text.translate(_WIDE).lower().strip().replace("\n", " ")

    answer = plain(prediction.strip())
    return float(any(plain(reference) in answer for reference in references))


def pope(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer is the right one of "yes" and "no"; "Yes." is neither, and wrong."""
    return float(pope_answer(prediction) in map(pope_answer, references))


def pope_answer(text: str) -> str:
    return text.lower().strip()


def mme(prediction: str, references: Sequence[str]) -> float:
    """1 if yes and no are told apart rightly; what is neither is wrong."""
    answer = mme_answer(prediction)
    return float(answer is not None and answer in map(_without_periods, references))


def mme_answer(text: str) -> str | None:
    """ "yes", "no" or None: the whole answer, its only letter, or what its first four characters
    have in them, yes before no."""
    text = _without_periods(text)
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    return next((word for word in ("yes", "no") if word in text[:YES_WINDOW]), None)


def _without_periods(text: str) -> str:
    return text.lower().strip().replace(".", "")


def _squeeze(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float | None:
    """What Python reads as a number, "%" as hundredths."""
    percent = text.endswith("%")
    try:
        return float(text.rstrip("%")) / 100 if percent else float(text)
    except ValueError:
        return None
