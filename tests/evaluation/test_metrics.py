import numpy as np
import pytest

from meteor_jax.evaluation.metrics import (
    METRICS,
    Estimate,
    anls,
    exact_match,
    interval,
    mean_estimate,
    paired_difference,
    relaxed_accuracy,
    wilson,
    yes_f1,
    yes_no,
)


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("red", ["red"], 1),
        ("Red", ["red"], 1),
        ("red.", ["red"], 1),
        (" red\n", ["red"], 1),
        ("dark  red", ["dark red"], 1),
        ("it's", ["its"], 1),
        ("red", ["blue", "RED"], 1),
        ("redd", ["red"], 0),
        ("re d", ["red"], 0),
        ("the red", ["red"], 0),
        ("", ["red"], 0),
        ("two", ["2"], 0),
        ("3", ["3"], 1),
        ("red", [], 0),
    ],
)
def test_exact_match(prediction, references, score):
    assert exact_match(prediction, references) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("yes", "yes", 1),
        ("no", "no", 1),
        ("yes", "no", 0),
        ("no", "yes", 0),
        ("Yes.", "yes", 1),
        (" NO ", "no", 1),
        ("yes!", "Yes", 1),
        ('"no"', "no", 1),
        ("yes it is", "yes", 0),
        ("nope", "no", 0),
        ("not", "no", 0),
        ("", "no", 0),
        ("maybe", "yes", 0),
    ],
)
def test_yes_no(prediction, reference, score):
    assert yes_no(prediction, [reference]) == score


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("house", ["house"], 1),
        ("HOUSE", ["house"], 1),
        ("  house ", ["house"], 1),
        ("hous", ["house"], 1 - 1 / 5),
        ("houses", ["house"], 1 - 1 / 6),
        ("mouse", ["house"], 1 - 1 / 5),
        ("ab", ["ac"], 0.5),  # exactly the threshold counts
        ("abc", ["axy"], 0),  # one third is below it
        ("", ["house"], 0),
        ("", [""], 1),
        ("hous", ["cat", "house"], 0.8),
        ("hous", ["house", "hous"], 1),  # the best reference, not the first
        ("12  34", ["12 34"], 1),
        ("1234", ["1235"], 0.75),
        ("cat", ["dogs", "bird"], 0),
    ],
)
def test_anls(prediction, references, score):
    assert anls(prediction, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("100", "100", 1),
        ("105", "100", 1),
        ("95", "100", 1),
        ("106", "100", 0),
        ("94.9", "100", 0),
        ("1.05", "1", 1),  # the bound itself, in spite of rounding
        ("-10", "-10.4", 1),
        ("10", "-10", 0),
        ("5%", "0.05", 1),
        ("5 %", "5%", 1),
        ("5", "5%", 0),
        ("0", "0", 1),
        ("0.0", "0", 1),
        ("0.01", "0", 0),
        ("0%", "0", 1),
        ("1e2", "100", 1),
        ("Blue", "blue", 1),
        (" blue ", "blue", 1),
        ("blue", "green", 0),
        ("nan", "NaN", 1),  # a word, never a number
        ("nan", "3", 0),
        ("1_0", "10", 0),
        ("", "10", 0),
    ],
)
def test_relaxed_accuracy(prediction, reference, score):
    assert relaxed_accuracy(prediction, [reference]) == score


def test_every_score_lies_between_0_and_1():
    texts = ["", "yes", "no", "7", "5%", "-0", "word", "a longer answer", "inf", "%"]
    for metric in METRICS.values():
        assert all(0 <= metric(a, [b]) <= 1 for a in texts for b in texts)


def test_f1_by_hand():
    predictions = ["yes", "yes", "no", "no", "what", "what"]
    references = [["yes"], ["no"], ["yes"], ["no"], ["yes"], ["no"]]
    # one hit; precision 1/2, recall 1/3
    assert yes_f1(predictions, references) == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert yes_f1(["no"], [["no"]]) == 0.0


def test_wilson_by_hand():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert 0.6 < wilson(10, 10)[0] < 1.0  # never of no width, as a bootstrap's would be
    assert wilson(0, 10)[0] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("num_right", "n", "ends"),
    [
        (0, 1, (0.0, 0.7934506856227626)),
        (0, 10, (0.0, 0.2775327998628892)),
        (1, 3, (0.06149194472039621, 0.7923403991979522)),
        (50, 999, (0.038168635912072035, 0.06537859770829303)),
        (6500, 12345, (0.5177144158367374, 0.5353269971722651)),
        (999_999, 10**6, (0.9999943350881957, 0.9999998234754233)),
    ],
)
def test_wilson_gives_the_ends_of_the_formula(num_right, n, ends):
    """Written down from the closed formula, before scipy computed them."""
    assert wilson(num_right, n) == pytest.approx(ends, rel=0, abs=1e-9)


def test_interval_chooses_by_the_scores():
    assert interval([1, 0, 1, 1]) == wilson(3, 4)
    fractional = [0.2, 0.9, 0.5, 1.0, 0.0] * 40
    low, high = interval(fractional)
    mean, deviation = np.mean(fractional), np.std(fractional) / np.sqrt(200)
    assert low == pytest.approx(mean - 1.96 * deviation, abs=0.01)
    assert high == pytest.approx(mean + 1.96 * deviation, abs=0.01)
    assert interval(fractional) == (low, high)
    assert interval(fractional, seed=1) != (low, high)


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 500).astype(float)
    b = a.copy()
    b[:40] = 0.0
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(a[:40].sum() / 500)
    assert difference.low > 0
    assert difference.high - difference.low < (interval(a)[1] - interval(a)[0]) / 2
    with pytest.raises(ValueError, match="same questions, got 500 and 3"):
        paired_difference(a, b[:3])


def test_the_mean_over_tasks_is_known_better_than_each_task():
    tasks = [Estimate(0.5, 0.1, 0.8), Estimate(0.7, 0.4, 1.1)]
    mean = mean_estimate(tasks)
    # Errors of 0.4 and 0.3 below, 0.3 and 0.4 above: 0.5 in the square sum, halved by two tasks.
    assert (mean.mean, mean.low, mean.high) == pytest.approx((0.6, 0.35, 0.85))
