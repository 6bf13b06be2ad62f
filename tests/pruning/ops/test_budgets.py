"""λ and the static totals, over K that are known."""

import numpy as np
import pytest

from meteor_jax.pruning.budgets import Adaptive
from meteor_jax.pruning.ops.budgets import BATCH_ROWS, expected_total, fit_edges, fit_lambda

HIGH = 42


def kept(spread=4.0, num_images=200):
    """K of four questions about each image, 28 on average."""
    rng = np.random.default_rng(0)
    drawn = np.round(28 + spread * rng.standard_normal((num_images, 4)))
    return list(np.clip(drawn, 14, HIGH).astype(int))


def test_the_mean_of_k_meets_the_target():
    total_vav = np.random.default_rng(0).uniform(0.2, 1.0, 500)
    many = np.full(500, 100)
    lambda_ = fit_lambda(total_vav, low_high=(10, 60), target=30, available=many)
    kept = np.clip(np.round(lambda_ * total_vav), 10, 60)
    assert abs(kept.mean() - 30) < 0.1 and kept.std() > 3
    with pytest.raises(ValueError, match="no text attention"):
        fit_lambda(np.zeros(4), low_high=(1, 2), target=1, available=np.full(4, 9))


def test_the_mean_of_k_meets_the_target_where_fewer_tokens_reach_the_step():
    total_vav = np.random.default_rng(0).uniform(0.2, 1.0, 500)
    few = np.full(500, 35)
    lambda_ = fit_lambda(total_vav, low_high=(10, 60), target=30, available=few)
    kept = np.clip(np.round(lambda_ * total_vav), 10, 60)
    assert abs(np.minimum(kept, few).mean() - 30) < 0.1
    assert kept.mean() > 32  # what would have been enough without the limit keeps too few


@pytest.mark.parametrize("num_totals", [1, 2, 3])
def test_at_most_so_many_totals_increasing_and_none_above_the_largest_k(num_totals):
    edges = fit_edges(kept(), high=HIGH, num_totals=num_totals)
    assert tuple(rows for rows, _ in edges) == BATCH_ROWS
    for rows, of_rows in edges:
        assert len(of_rows) <= num_totals - 1
        assert list(of_rows) == sorted(of_rows) and all(edge <= HIGH for edge in of_rows)
        budget = Adaptive(28, num_totals=num_totals, edges=edges)
        totals = budget.totals(rows=rows, available=HIGH)
        assert len(totals) <= num_totals and totals[-1] == rows * HIGH


@pytest.mark.parametrize(
    ("rows", "num_shards", "expected"),
    [
        (8, 1, 1.06),
        (8, 8, 1.12),
        (8, 64, 1.14),
        (1, 1, 1.11),
        (1, 8, 1.26),
        (1, 64, 1.36),
        (32, 1, 1.04),
        (32, 8, 1.07),
    ],
)
def test_batches_compute_little_more_than_the_mean_of_their_k(rows, num_shards, expected):
    """The figures of docs/evaluate.md; on more devices the fullest shard chooses for all."""
    sample, questions = kept(num_images=64), kept(num_images=1000)
    edges = dict(fit_edges(sample, high=HIGH, num_totals=3, num_shards=num_shards))[rows]
    totals = [*(np.ceil(rows * edge) for edge in edges), rows * HIGH]
    computed = expected_total(questions, rows=rows, totals=totals, num_shards=num_shards)
    assert computed / np.concatenate(questions).mean() == pytest.approx(expected, abs=0.006)


def test_the_totals_of_a_mesh_hold_its_fullest_shard():
    """Those of one device would send nearly every batch to the largest total."""
    sample, questions = kept(), kept(num_images=1000)

    def computed(edges):
        totals = [*(np.ceil(4 * edge) for edge in dict(edges)[4]), 4 * HIGH]
        return expected_total(questions, rows=4, totals=totals, num_shards=64)

    for_one = fit_edges(sample, high=HIGH, num_totals=3)
    for_all = fit_edges(sample, high=HIGH, num_totals=3, num_shards=64)
    assert computed(for_all) < computed(for_one)


def test_expected_total_by_hand():
    """Batches (2 + 4, 6) of one row a shard: the first fits 4, the other 6 with its repeat."""
    of_images = [np.array([2, 4]), np.array([6])]
    assert expected_total(of_images, rows=1, totals=[4, 6, 9], num_shards=2) == 5.0
    assert expected_total(of_images, rows=1, totals=[4, 6, 9]) == (4 + 4 + 6) / 3
