"""The one top-k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.pruning.select import keep_topk


def test_the_highest_scores_stay_in_order():
    selection = keep_topk(jnp.asarray([[0.1, 0.9, 0.3, 0.8, 0.2, 0.7]]), keep=3)
    np.testing.assert_array_equal(selection.idx, [[1, 3, 5]])
    assert selection.valid.all()


def test_of_equal_scores_the_earlier_stays():
    np.testing.assert_array_equal(keep_topk(jnp.zeros((1, 5)), keep=2).idx, [[0, 1]])


def test_an_invalid_entry_never_comes_before_a_valid_one():
    scores = jnp.asarray([[-jnp.inf, 9.0, -5.0, 8.0]])
    valid = jnp.asarray([[True, False, True, False]])
    selection = keep_topk(scores, keep=3, valid=valid)
    np.testing.assert_array_equal(selection.idx[0, :2], [0, 2])
    np.testing.assert_array_equal(selection.valid, [[True, True, False]])


def test_each_example_keeps_its_own_number():
    scores = jnp.asarray([[4.0, 1.0, 3.0, 2.0]] * 2)
    selection = keep_topk(scores, keep=3, num_keep=jnp.asarray([1, 3]))
    np.testing.assert_array_equal(selection.valid, [[True, False, False], [True, True, True]])
    assert selection.idx[0, 0] == 0
    np.testing.assert_array_equal(selection.idx[1], [0, 2, 3])


def test_too_large_a_budget_is_one_line():
    with pytest.raises(ValueError, match="cannot keep 5 of 4 tokens"):
        keep_topk(jnp.zeros((1, 4)), keep=5)


def test_no_gradient_flows_through_the_scores():
    def kept_sum(scores):
        selection = keep_topk(scores, keep=2)
        return (selection.valid * 1.0).sum() + scores.sum() * 0

    np.testing.assert_array_equal(jax.grad(kept_sum)(jnp.arange(4.0)), np.zeros(4))
