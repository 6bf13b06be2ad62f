"""Sharing tokens among encoders."""

import numpy as np
import pytest

from meteor_jax.pruning.ops.allocate import allocate

AVAILABLE = {"clip": 36, "convnext": 64, "pix2struct": 81}
RANKS = {"clip": 10.0, "convnext": 20.0, "pix2struct": 30.0}


def test_allocate_by_rank():
    assert allocate(60, ranks=RANKS, available=AVAILABLE) == {
        "clip": 10,
        "convnext": 20,
        "pix2struct": 30,
    }


def test_allocate_inversely():
    counts = allocate(66, ranks=RANKS, available=AVAILABLE, assignment="inverse_rank")
    assert counts == {"clip": 36, "convnext": 18, "pix2struct": 12}


def test_allocate_uniformly():
    for ranks in ({}, dict.fromkeys(AVAILABLE, 0.0)):
        counts = allocate(60, ranks=ranks, available=AVAILABLE, assignment="uniform")
        assert counts == dict.fromkeys(AVAILABLE, 20)


def test_allocate_gives_what_is_over_to_the_others():
    # By rank 25, 50, 75; 64 tokens are enough for 50, 81 for 75; then 30, 60, 90 → 81, 69 left.
    assert allocate(180, ranks=RANKS, available=AVAILABLE) == {
        "clip": 35,
        "convnext": 64,
        "pix2struct": 81,
    }


@pytest.mark.parametrize("assignment", ["rank", "uniform", "inverse_rank"])
def test_allocate_sums_exactly_and_respects_caps(assignment):
    random = np.random.default_rng(0)
    for _ in range(200):
        names = [f"encoder{i}" for i in range(random.integers(1, 6))]
        available = {name: int(random.integers(1, 100)) for name in names}
        ranks = {name: float(random.uniform(0.5, 50)) for name in names}
        total = int(random.integers(0, sum(available.values()) + 1))
        counts = allocate(total, ranks=ranks, available=available, assignment=assignment)
        assert sum(counts.values()) == total
        assert all(0 <= counts[name] <= available[name] for name in names)
        assert list(counts) == names


def test_allocate_in_windows():
    random = np.random.default_rng(0)
    for _ in range(200):
        available = {"clip": 40, "eva": 64, "sam": 75}
        ranks = {name: float(random.uniform(0.5, 50)) for name in available}
        multiple_of = {"eva": 16, "sam": 25}
        total = int(random.integers(40, 60))
        counts = allocate(total, ranks=ranks, available=available, multiple_of=multiple_of)
        assert sum(counts.values()) == total
        assert all(0 <= counts[name] <= available[name] for name in available)
        assert counts["eva"] % 16 == counts["sam"] % 25 == 0


def test_allocate_rounds_windows_up_where_others_are_full():
    counts = allocate(
        20,
        ranks={"clip": 1, "eva": 1e-3},
        available={"clip": 10, "eva": 64},
        multiple_of={"eva": 16},
    )
    assert counts == {"clip": 4, "eva": 16}


def test_allocate_leaves_no_encoder_without_a_token():
    ranks, available = (
        {"clip": 1e-3, "pix2struct": 50.0, "eva": 1e-3},
        dict.fromkeys(("clip", "pix2struct", "eva"), 64),
    )
    counts = allocate(60, ranks=ranks, available=available, multiple_of={"eva": 16})
    assert counts == {"clip": 1, "pix2struct": 43, "eva": 16}
    assert allocate(1, ranks=ranks, available=available) == {"clip": 0, "pix2struct": 1, "eva": 0}


def test_allocate_errors():
    with pytest.raises(ValueError, match=r"between 0 and 181 tokens.*got 182"):
        allocate(182, ranks=RANKS, available=AVAILABLE)
    with pytest.raises(ValueError, match="none for pix2struct"):
        allocate(9, ranks={"clip": 1.0, "convnext": 1.0}, available=AVAILABLE)
    with pytest.raises(ValueError, match="more than 0 for clip"):
        allocate(9, ranks=RANKS | {"clip": 0.0}, available=AVAILABLE)
    with pytest.raises(ValueError, match="expected one of rank"):
        allocate(9, ranks=RANKS, available=AVAILABLE, assignment="ranks")
    with pytest.raises(ValueError, match="multiples of 16"):
        allocate(20, ranks={"eva": 1.0}, available={"eva": 64}, multiple_of={"eva": 16})
