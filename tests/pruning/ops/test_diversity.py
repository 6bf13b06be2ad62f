"""Selections and merges by likeness, on examples worked by hand."""

import jax
import numpy as np

from meteor_jax.pruning.methods import dart, divprune, visionzip
from meteor_jax.pruning.ops import merge

# Each as one program, which is quicker than its operations one by one.
unlike_pivots = jax.jit(dart.unlike_pivots)
farthest_points = jax.jit(divprune.farthest_points, static_argnames="keep")
merge_rest = jax.jit(visionzip.merge_rest, static_argnames=("keep", "num_merge_targets"))
density_peaks = jax.jit(merge.density_peaks, static_argnames="max_clusters")
mean_of_clusters = jax.jit(merge.mean_of_clusters, static_argnames="num_clusters")


def angles(*degrees, lengths=1.0):
    """float[1, N, 2]: tokens that point in these directions."""
    radians = np.deg2rad(degrees)
    return np.float32(np.stack([np.cos(radians), np.sin(radians)], -1) * lengths)[None]


def test_farthest_points_by_hand():
    # Nearest neighbours: 10° away for the first two, 80° for the third, 90° for the last, which
    # comes first. Farthest from 180° is 0°, then 90° (90° from both), then 10°.
    x = angles(0, 10, 90, 180, lengths=np.array([[1.0], [2.0], [0.5], [3.0]]))
    np.testing.assert_array_equal(farthest_points(x, keep=3), [[2, 0, 1, 3]])
    np.testing.assert_array_equal(farthest_points(x, keep=4), [[3, 1, 2, 4]])


def test_farthest_points_is_the_greedy_rule():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 12, 5)).astype(np.float32)
    scores = np.asarray(farthest_points(np.asarray(x), keep=7))
    for row, score in zip(x, scores, strict=True):
        unit = row / np.linalg.norm(row, axis=1, keepdims=True)
        distance = 1 - unit @ unit.T
        chosen = [int(np.argmax(np.where(np.eye(12), np.inf, distance).min(1)))]
        while len(chosen) < 7:
            nearest = distance[chosen].min(0)
            nearest[chosen] = -1
            chosen.append(int(np.argmax(nearest)))
        np.testing.assert_array_equal(np.argsort(-score, kind="stable")[:7], chosen)
        assert (score > 0).sum() == 7


def test_farthest_points_never_takes_a_copy_before_something_new():
    x = angles(0, 0, 0, 90)
    assert set(np.flatnonzero(np.asarray(farthest_points(x, keep=2))[0])) == {0, 3}


def test_unlike_pivots_by_hand():
    # The pivot at 0° takes two, 180° and 135°; of what is left 270° is least like that at 90°.
    x = angles(0, 90, 180, 135, 270, 20)
    taken = unlike_pivots(
        x,
        pivots=np.asarray([[0, 1]]),
        pivot_valid=np.asarray([[True, True]]),
        candidates=np.asarray([[False, False, True, True, True, True]]),
        num_keep=np.asarray([3]),
    )
    np.testing.assert_array_equal(taken, [[0, 0, 1, 1, 1, 0]])


def test_a_pivot_that_is_none_takes_nothing():
    x = np.concatenate([angles(0, 90, 180, 135, 270, 20)] * 2)
    taken = unlike_pivots(
        x,
        pivots=np.asarray([[0, 1], [0, 1]]),
        pivot_valid=np.asarray([[False, True], [True, False]]),
        candidates=np.asarray([[False, False, True, True, True, True]] * 2),
        num_keep=np.asarray([2, 4]),
    )
    np.testing.assert_array_equal(taken, [[0, 0, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1]])


def test_merge_rest_by_hand():
    # 1 and 4 dominate. Of 0, 2, 3, 5 the targets are 0 and 3; 2 is like 0, and 5 like 3.
    x = np.asarray([[[1, 0], [7, 7], [2, 0.25], [0, 1], [-7, 7], [0, 4]]], np.float32)
    scores = np.asarray([[0, 9, 0, 0, 8, 0]], np.float32)
    merged, places = merge_rest(x, scores, keep=4, num_merge_targets=2)
    np.testing.assert_array_equal(places, [[0, 1, 3, 4]])
    np.testing.assert_allclose(merged, [[[3, 0.25], [7, 7], [0, 5], [-7, 7]]])


def test_merge_rest_averages_what_goes_to_one_target():
    x = np.asarray([[[1, 0], [2, 0], [4, 0], [0, 9]]], np.float32)
    merged, places = merge_rest(x, np.asarray([[0, 0, 0, 1.0]]), keep=2, num_merge_targets=1)
    np.testing.assert_array_equal(places, [[0, 3]])
    np.testing.assert_allclose(merged, [[[1 + 3, 0], [0, 9]]])


def test_gradients_flow_through_what_was_merged_but_not_through_the_choice():
    x = np.asarray([[[1, 0], [2, 0], [4, 0], [0, 9]]], np.float32)

    def first_kept(x, scores):
        return merge_rest(x, scores, keep=2, num_merge_targets=1)[0][0, 0, 0]

    to_x, to_scores = jax.jit(jax.grad(first_kept, argnums=(0, 1)))(x, np.float32([[0, 0, 0, 1]]))
    np.testing.assert_allclose(to_x[0, :, 0], [1, 0.5, 0.5, 0])
    np.testing.assert_array_equal(to_scores, np.zeros((1, 4)))


def test_density_peaks_by_hand():
    # Mean squared distances to the two nearest (one is the point itself): ½, ½, 2, 1⅛, 1⅛. So 0 is
    # densest and 10 is dense and far from it: the centres of {0, 1, 3} and {10, 11.5}.
    x = np.asarray([[0, 1, 3, 10, 11.5, 100]], np.float32)[..., None]
    valid = np.asarray([[True] * 5 + [False]])
    found = density_peaks(x, valid=valid, num_clusters=np.asarray([2]), max_clusters=3)
    np.testing.assert_array_equal(found.valid, [[True, True, False]])
    np.testing.assert_array_equal(found.centre[0, :2], [0, 3])
    np.testing.assert_array_equal(found.of_token, [[0, 0, 0, 1, 1, 3]])
    means = mean_of_clusters(x, found.of_token, num_clusters=3)
    np.testing.assert_allclose(means[0, :, 0], [4 / 3, 10.75, 0], rtol=1e-6)


def test_equal_tokens_still_make_as_many_clusters_as_asked():
    x = np.ones((1, 5, 2))
    found = density_peaks(
        x, valid=np.ones((1, 5), bool), num_clusters=np.asarray([2]), max_clusters=2
    )
    assert found.valid.all() and len(set(np.asarray(found.centre[0]))) == 2
    np.testing.assert_array_equal(found.of_token[0, found.centre[0]], [0, 1])


def test_what_is_not_finite_is_no_pivots_choice_and_in_no_mean():
    x = angles(0, 90, 180, 0, 270, 20)
    x[0, 3] = np.nan
    taken = unlike_pivots(
        x,
        pivots=np.asarray([[0, 1]]),
        pivot_valid=np.asarray([[True, True]]),
        candidates=np.asarray([[False, False, True, True, True, True]]),
        num_keep=np.asarray([3]),
    )
    np.testing.assert_array_equal(taken, [[0, 0, 1, 0, 1, 1]])
    # As in test_merge_rest_by_hand: 2 is merged into nothing, 3 becomes the mean of what it gets.
    x = np.asarray([[[1, 0], [7, 7], [2, np.nan], [np.inf, 1], [-7, 7], [3, 4]]], np.float32)
    merged, places = merge_rest(x, np.asarray([[0, 9, 0, 0, 8.0, 0]]), keep=4, num_merge_targets=2)
    np.testing.assert_array_equal(places, [[0, 1, 3, 4]])
    np.testing.assert_allclose(merged, [[[4, 4], [7, 7], [0, 0], [-7, 7]]])


def test_what_is_not_finite_is_no_cluster():
    x = np.asarray([[0, 1, 3, np.nan, 10, 11.5]], np.float32)[..., None]
    found = density_peaks(
        x, valid=np.ones((1, 6), bool), num_clusters=np.asarray([2]), max_clusters=2
    )
    np.testing.assert_array_equal(found.centre, [[0, 4]])  # as in test_density_peaks_by_hand
    np.testing.assert_array_equal(found.of_token, [[0, 0, 0, 2, 1, 1]])
    means = mean_of_clusters(x, found.of_token, num_clusters=2)
    np.testing.assert_allclose(means[0, :, 0], [4 / 3, 10.75], rtol=1e-6)
