"""METEOR's fusion and its controls, on examples worked by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.eagle.fusion import prune_fused
from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.method import ReductionContext, Span
from meteor_jax.pruning.methods import meteor
from meteor_jax.pruning.methods.divprune import DivPrune
from meteor_jax.pruning.methods.independent import Independent
from meteor_jax.pruning.methods.meteor import MutualRedundancy
from meteor_jax.pruning.methods.pool import Pool, pooled_grids
from meteor_jax.pruning.methods.random import Random
from meteor_jax.pruning.methods.uniform import Uniform
from meteor_jax.pruning.plan import Step
from meteor_jax.types import VisualTokens

# Two encoders of three tokens each, in two dimensions.
X = np.float32([[[1, 0], [0, 2], [3, 3], [5, 0], [0, -1], [2, 0]]])
SPANS = (Span("a", 0, 3, 0), Span("b", 3, 3, 0))
SEED = np.uint32([7])

# Each as one program, which is quicker than its operations one by one.
mutual_redundancy = jax.jit(meteor.mutual_redundancy, static_argnames=("spans", "similarity"))
position_redundancy = jax.jit(meteor.position_redundancy)


def tokens_of(x):
    place = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    return VisualTokens(x, place * 0, place, place, span=x.shape[1])


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="spans")
def fuse(keep, method, x, *, spans=SPANS, seed=SEED):
    step = Step("fusion", method, Fixed(keep))
    context = ReductionContext(image_seed=jnp.asarray(seed))
    return prune_fused(tokens_of(x), step, spans=spans, context=context)[0]


def kept(keep, method, x=X, spans=SPANS, seed=SEED):
    return np.asarray(fuse(keep, method, x, spans=spans, seed=seed).patch_index)


def test_mutual_redundancy_by_hand():
    # Unit tokens of b sum to (2, −1), those of a to (1 + √½, 1 + √½).
    half = np.sqrt(0.5)
    expected = [[2, -1, half, 1 + half, -1 - half, 1 + half]]
    np.testing.assert_allclose(mutual_redundancy(X, spans=SPANS), expected, atol=1e-5)


def test_position_redundancy_sums_over_the_encoders_at_a_place():
    # The encoders' tokens at a place are columns of test_mutual_redundancy_by_hand's row.
    half = np.sqrt(0.5)
    expected = [[2 + 1 + half, -1 - 1 - half, half + 1 + half]]
    parts = [X[:, :3], X[:, 3:]]
    np.testing.assert_allclose(position_redundancy(parts), expected, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "abs_cosine", "centered_cosine", "max_cosine"])
@pytest.mark.parametrize("left", [[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0]])
def test_mutual_redundancy_is_the_double_sum(similarity, left):
    x = np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)
    y = x[0].copy()
    if similarity == "centered_cosine":
        y[:3] -= y[:3].mean(0)
        y[3:] -= y[3:].mean(0)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    cosine = y @ y.T
    if similarity == "abs_cosine":
        cosine = np.abs(cosine)
    joined = np.max if similarity == "max_cosine" else np.sum
    a, b = np.flatnonzero(left[:3]), 3 + np.flatnonzero(left[3:])
    expected = np.concatenate([joined(cosine[:3, b], axis=1), joined(cosine[3:, a], axis=1)])
    actual = mutual_redundancy(x, spans=SPANS, similarity=similarity, left=np.array([left], bool))[
        0
    ]
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_cooperative_keeps_the_least_redundant():
    np.testing.assert_array_equal(kept(3, MutualRedundancy("cosine")), [[1, 2, 4]])


@pytest.mark.parametrize("similarity", ["cosine", "max_cosine"])
def test_iterations_keep_one_copy_of_what_two_encoders_share(similarity):
    """Two things that both encoders see, one more alike than the other, and a third of each one's
    own. Dropped at once, the first thing goes with both copies; in two iterations a copy of
    each stays."""
    things = np.eye(6, dtype=np.float32)
    x = np.stack([2 * things[0], *things[1:3], *things[:2], things[3]])[None]
    x[0, 3] += 0.05 * things[5]
    x[0, 4] += 0.1 * things[4]
    assert kept(4, MutualRedundancy(similarity), x)[0].tolist() == [1, 2, 4, 5]
    one_by_one = set(kept(4, MutualRedundancy(similarity, num_iterations=2), x)[0].tolist())
    assert {2, 5} <= one_by_one
    assert len({0, 3} & one_by_one) == 1 and len({1, 4} & one_by_one) == 1


def test_no_iterations_is_an_error():
    with pytest.raises(ValueError, match="num_iterations: expected 1 or more, got 0"):
        MutualRedundancy(num_iterations=0)


def test_centred_cosine_ranks_tokens_where_an_encoder_has_a_bias():
    """Three plain places and an object, seen by both encoders; b's tokens also share a direction
    that a's object happens to share. The plain cosine drops the object, the centred one plain
    places."""
    plain, thing = [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]
    x = np.float32([[plain, plain, plain, thing] * 2])
    x[:, 4:] += np.float32([9, 0, 9])
    spans = (Span("a", 0, 4, 0), Span("b", 4, 4, 0))
    similarities = ("cosine", "centered_cosine")
    stays = {s: kept(5, MutualRedundancy(s), x, spans)[0].tolist() for s in similarities}
    assert 3 not in stays["cosine"]
    assert {3, 7} <= set(stays["centered_cosine"])


def test_a_floor_keeps_a_share_of_every_encoder():
    x = X.copy()
    x[:, 3:] = 1.0  # b says throughout what a says
    method = MutualRedundancy("cosine")
    share = (kept(2, method, x) >= 3).sum()
    floored = (kept(2, dataclasses.replace(method, min_share_per_encoder=0.5), x) >= 3).sum()
    assert share == 0 and floored == 1


def test_uniform_takes_equal_strides():
    np.testing.assert_array_equal(kept(3, Uniform()), [[1, 3, 5]])


def test_independent_drops_what_is_like_its_own_mean():
    # Of a, (3, 3) lies along a's mean (4/3, 5/3); of b, (2, 0) along b's, (7/3, 1/3).
    x = X.copy()
    x[0, 3] = 5.0, 2.0
    np.testing.assert_array_equal(kept(4, Independent(), x), [[0, 1, 3, 4]])


def test_random_depends_on_image_and_seed_but_not_on_the_batch():
    both = kept(3, Random(), np.concatenate([X, X]), seed=np.uint32([7, 8]))
    np.testing.assert_array_equal(both[:1], kept(3, Random()))
    draws = {tuple(kept(3, Random(), seed=np.uint32([seed]))[0].tolist()) for seed in range(12)}
    assert len(draws) > 4
    assert (np.diff(both, axis=1) > 0).all()


def test_pooling_averages_cells():
    grid = np.arange(16, dtype=np.float32).reshape(1, 16, 1)
    spans = (Span("a", 0, 16, 4),)
    pooled = fuse(4, Pool(), grid, spans=spans)
    np.testing.assert_allclose(pooled.x[0, :, 0], [2.5, 4.5, 10.5, 12.5])
    np.testing.assert_array_equal(pooled.patch_index, [[5, 7, 13, 15]])


def test_pooled_grids_fit_their_budget():
    spans = (Span("a", 0, 64, 8), Span("b", 64, 16, 4), Span("c", 80, 36, 6))
    for keep in range(3, 117):
        sides = pooled_grids(keep, spans=spans)
        assert sum(side**2 for side in sides) <= keep
        assert all(side <= span.grid for side, span in zip(sides, spans, strict=True))
    assert pooled_grids(116, spans=spans) == (8, 4, 6)
    large = (Span("a", 0, 1024, 32), Span("b", 1024, 4, 2), Span("c", 1028, 4, 2))
    assert pooled_grids(5, spans=large) == (1, 1, 1)


@pytest.mark.parametrize(("keep", "message"), [(1, "less than a cell"), (99, "only 6 tokens")])
def test_pooling_to_more_than_there_is_or_to_less_than_a_cell_is_an_error(keep, message):
    spans = (Span("a", 0, 4, 2), Span("b", 4, 1, 1), Span("c", 5, 1, 1))
    with pytest.raises(ValueError, match=message):
        kept(keep, Pool(), spans=spans)


def test_pooling_tokens_dropped_before_is_an_error():
    with pytest.raises(ValueError, match="use it without steps inside"):
        kept(2, Pool(), spans=(Span("a", 0, 6, 3),))


def test_selection_is_jittable_and_static():
    function = jax.jit(lambda x: fuse(3, MutualRedundancy(), x).x)
    for scale in range(1, 4):
        assert function(X * scale).shape == (1, 3, 2)
    assert function._cache_size() == 1


@pytest.mark.parametrize(
    "method",
    [
        MutualRedundancy("cosine"),
        MutualRedundancy("abs_cosine"),
        MutualRedundancy("centered_cosine"),
        MutualRedundancy("max_cosine"),
        MutualRedundancy(num_iterations=2),
        MutualRedundancy(min_share_per_encoder=0.25),
        DivPrune(),
        Independent(),
    ],
    ids=str,
)
def test_a_token_that_is_not_finite_is_dropped_and_changes_no_other(method):
    x = np.random.default_rng(1).normal(size=(3, 12, 4)).astype(np.float32)
    spans = Span("a", 0, 6, 0), Span("b", 6, 6, 0)
    without = np.delete(x, 2, axis=1), (Span("a", 0, 5, 0), Span("b", 5, 6, 0))
    x[:, 2, 1] = np.nan, np.inf, 1e30  # the square of the last overflows
    found = kept(4, method, x=x, spans=spans)
    expected = kept(4, method, x=without[0], spans=without[1])
    assert 2 not in found
    if not isinstance(method, Independent):  # whose shares follow the number of tokens
        np.testing.assert_array_equal(found, expected + (expected >= 2))
