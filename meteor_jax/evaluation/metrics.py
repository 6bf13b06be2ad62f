"""How an answer to one of our own sets is scored, and how sure we are of a mean score.

Every metric is `(prediction, references) -> float in [0, 1]`; with several references the best one
counts. The rules are those of the benchmarks that ask the same, made a little kinder;
each docstring names the difference. The benchmarks' own are in `tasks.scoring`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05
NUM_RESAMPLES = 2000

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", flags=re.IGNORECASE)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the answers are equal without case, punctuation and outer or repeated spaces.

    Source: `exact_match` of Hugging Face evaluate with both ignore flags, as GQA and AI2D use
    it. There, a leading space already makes an answer wrong; here it does not.
    """

    def normalise(text: str) -> str:
        return _squeeze(text.translate(_PUNCTUATION))

    return float(normalise(prediction) in {normalise(reference) for reference in references})


def yes_no(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer is the right one of yes and no; what is neither is wrong.

    Source: POPE's scorer (`lower().strip()`, then equality). There, "Yes." is wrong; here
    punctuation around the word is ignored.
    """
    answer = parse_yes_no(prediction)
    return float(answer is not None and answer in map(parse_yes_no, references))


def parse_yes_no(text: str) -> str | None:
    """ "yes", "no", or None where `text` is neither."""
    word = text.strip().strip(string.punctuation).strip().lower()
    return word if word in ("yes", "no") else None


def anls(prediction: str, references: Sequence[str]) -> float:
    """Normalised Levenshtein similarity, 0 where it is below one half.

    1 − distance / length of the longer, after lower-casing and squeezing spaces. Source: DocVQA
    (Biten et al., ICCV 2019). The bundled copy turns every nonzero similarity into 1 and takes
    the lengths before normalising; here the best reference's similarity is the score.
    """
    best = 0.0
    for reference in map(_squeeze, references):
        answer = _squeeze(prediction)
        longest = max(len(answer), len(reference))
        similarity = 1.0 - Levenshtein.distance(answer, reference) / longest if longest else 1.0
        best = max(best, similarity)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1 if a number is within 5 % of the reference number, or a text equals the reference text.

    "12%" reads as 0.12. A reference of 0 wants a 0; where either side is no number, the texts must
    be equal without case. Source: ChartQA (Masry et al., 2022). There, "0.0" does not answer "0",
    and outer spaces make a text wrong; here neither does.
    """

    def score(reference: str) -> float:
        answer, target = parse_number(prediction), parse_number(reference)
        if answer is None or target is None:
            return float(_squeeze(prediction) == _squeeze(reference))
        # The slack is for rounding: 1.05 − 1 is a little more than 0.05 in binary.
        return float(abs(answer - target) <= RELAXED_TOLERANCE * abs(target) * (1 + 1e-9))

    return max(map(score, references), default=0.0)


def parse_number(text: str) -> float | None:
    """The number that `text` is, "%" read as a hundredth, or None."""
    text = text.strip()
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text) / (100 if percent else 1)
    return number if math.isfinite(number) else None


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    function.__name__: function for function in (exact_match, yes_no, anls, relaxed_accuracy)
}


def yes_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F1 with "yes" as the positive class; an answer that is neither counts as not "yes".

    0 where nothing is, or is called, "yes".
    """
    counts = Counter(
        (parse_yes_no(answer) == "yes", "yes" in map(parse_yes_no, of_answer))
        for answer, of_answer in zip(predictions, references, strict=True)
    )
    hits, errors = counts[True, True], counts[True, False] + counts[False, True]
    return 2 * hits / (2 * hits + errors) if hits else 0.0


def interval(scores: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for scores of 0 and 1, a seeded bootstrap for others.

    Takes the questions as independent; several about one image are not quite.
    """
    values = np.asarray(scores, np.float64)
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(int(values.sum()), len(values))
    return _bootstrap(values, seed=seed)


def wilson(num_right: int, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927), 95 %, of a share `num_right / n`."""
    from scipy.stats import binomtest  # as slow to import as jax

    ends = binomtest(num_right, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(ends.low), float(ends.high)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_difference(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Estimate:
    """How much better plan `a` is than plan `b` on the very same questions, in the mean.

    Pairing takes out what makes a question hard for both, so the interval is much narrower than
    the two plans' own.

    Raises:
        ValueError: if the two do not score the same, non-empty number of questions.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"expected scores of the same questions, got {len(a)} and {len(b)}.")
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    low, high = _bootstrap(difference, seed=seed)
    return Estimate(mean=float(difference.mean()), low=low, high=high)


def mean_estimate(tasks: Sequence[Estimate]) -> Estimate:
    """The mean of the tasks' means; the interval takes the tasks as independent."""
    mean = float(np.mean([task.mean for task in tasks]))
    below = math.hypot(*(task.mean - task.low for task in tasks)) / len(tasks)
    above = math.hypot(*(task.high - task.mean for task in tasks)) / len(tasks)
    return Estimate(mean=mean, low=mean - below, high=mean + above)


def _bootstrap(scores: np.ndarray, *, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean.

    Drawing how often each distinct value occurs is the same as drawing questions; with few distinct
    scores it is over 30 times faster than `scipy.stats.bootstrap`, which draws every question.
    """
    values, counts = np.unique(scores, return_counts=True)
    n = len(scores)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=NUM_RESAMPLES)
    low, high = np.quantile(draws @ values / n, (0.025, 0.975))
    return float(low), float(high)


def _squeeze(text: str) -> str:
    return " ".join(text.lower().split())
