"""What the cuts of SparseVLM and DART choose, on a row worked by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.pruning.decode import (
    num_kept,
    pivot_scores,
    query_weights,
    recycle_dropped,
    select_entries,
    take_entries,
    text_query_mask,
)
from meteor_jax.pruning.ops.select import keep_topk
from meteor_jax.pruning.plan import DecodePlan
from meteor_jax.types import Sequence

ONE = jnp.asarray([1])


def row(x, kinds):
    """A row of one example; `kinds` has t for text, v for visual tokens, - for padding."""
    visual, slot = [], []
    texts = images = 0
    for kind in kinds:
        slot.append(texts)
        visual.append(images if kind == "v" else -1)
        texts += kind == "t"
        images += kind == "v"
    count = len(kinds)
    return Sequence(
        x=jnp.asarray(x, jnp.float32)[None],
        position=jnp.arange(count)[None],
        valid=jnp.asarray([kind != "-" for kind in kinds])[None],
        slot=jnp.asarray(slot)[None],
        visual=jnp.asarray(visual)[None],
    )


def test_raters_are_the_text_that_the_image_is_close_to():
    # Both visual tokens give 0.88 to the text at (1, 0); the text before the image is not asked.
    sequence = row([(9, 0), (2, 0), (2, 0), (0, 1), (1, 0), (0, 0)], "tvvtt-")
    raters = text_query_mask(sequence, num_text=4)
    np.testing.assert_array_equal(raters, [[False, False, True, False]])
    plan = DecodePlan(layers=(1,), keep=(1,), queries="raters", budget="fixed")
    weights = query_weights(sequence, plan=plan, raters=raters)
    np.testing.assert_array_equal(weights, [[0, 0, 0, 0, 1, 0]])
    # They are the same text after a cut, whose row is shorter.
    left = keep_topk(jnp.asarray([[1.0, 0, 1, 1, 1, 0]]), keep=4)
    weights = query_weights(take_entries(sequence, left), plan=plan, raters=raters)
    np.testing.assert_array_equal(weights, [[0, 0, 0, 1]])


def test_where_all_text_is_equal_all_rate_and_without_an_image_none_matters():
    equal = row([(1, 0)] * 4, "vttt")
    np.testing.assert_array_equal(text_query_mask(equal, num_text=3), [[True, True, True]])
    alone = row([(1, 0), (0, 1)], "tt")
    assert np.isfinite(np.asarray(text_query_mask(alone, num_text=2), np.float32)).all()


# By angle: text, five visual tokens, two text tokens; the keys of 1 and 6 are the largest.
ANGLES = np.deg2rad([50, 0, 10, 120, 180, 270, 90, 300])
STATES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)
SIZES = jnp.asarray([5, 4, 1, 2, 1, 1, 3, 1], jnp.float32)
KEYS = SIZES[None, :, None, None] * jnp.asarray([-1, 1.0])


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, [1]),  # the visual pivot alone
        (2, [1, 4]),  # then 180°, least like the pivot at 0°
        (3, [1, 4, 5]),  # then 270°, least like the text pivot at 90°
        (4, [1, 3, 4, 5]),  # the first pivot takes two: 180° and 120°
        (5, [1, 2, 3, 4, 5]),
        (9, [1, 2, 3, 4, 5]),
    ],
)
def test_pivot_scores_by_hand(keep, expected):
    plan = DecodePlan(layers=(1,), keep=(keep,), budget="fixed", criterion="pivots", pivots=(1, 1))
    sequence = row(STATES, "tvvvvvtt")
    scores = pivot_scores(sequence, KEYS, plan=plan, cut=0, num_images=ONE)
    np.testing.assert_array_equal(np.flatnonzero(scores[0]), expected)


def test_recycling_by_hand():
    # Of seven visual tokens 5 is best. The next five cluster at 0 and 10; 50 is lost.
    x = np.array([[7.0], [50], [0], [5], [1], [3], [10], [11.5], [8]])
    sequence = row(x, "tvvvvvvvt")
    scores = jnp.asarray([[0, 1, 6, 9, 5, 4, 3, 2, 0]], jnp.float32)
    after, stays = recycle_dropped(
        sequence,
        scores,
        recycled=5,
        clusters=2,
        num_images=ONE,
        max_images=2,
        num_kept=jnp.asarray([3]),
    )
    np.testing.assert_array_equal(np.flatnonzero(stays[0]), [2, 3, 6])
    expected = x[:, 0].copy()
    expected[[2, 6]] = 4 / 3, 10.75
    np.testing.assert_allclose(after.x[0, :, 0], expected, rtol=1e-6)


def test_how_many_are_recycled_is_sparsevlms_count():
    plan = DecodePlan(layers=(3,), keep=(300,), budget="fixed", recycle=0.3)
    assert plan.recycling(0, available=576) == (83, 9)  # 0.3 · 276 + 1, and a tenth + 1
    assert plan.recycling(0, available=300) == (0, 0)
    assert dataclasses.replace(plan, recycle=0.0).recycling(0, available=576) == (0, 0)
    with pytest.raises(ValueError, match="keep more or recycle fewer"):
        dataclasses.replace(plan, keep=(9,)).recycling(0, available=576)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recycle": 0.3}, "needs decode.budget='fixed'"),
        ({"recycle": 2.0, "budget": "fixed"}, "a share from 0 to 1"),
        ({"pivots": (0, 0)}, "one pivot at least"),
    ],
)
def test_fields_that_do_not_fit_are_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        DecodePlan(layers=(1,), keep=(4,), **fields)
    assert "\n" not in str(error.value)


def test_no_gradient_flows_through_a_choice():
    plan = DecodePlan(layers=(1,), keep=(3,), budget="fixed", criterion="pivots", pivots=(1, 1))

    def total(x):
        sequence = row(STATES, "tvvvvvtt").replace(x=x)
        return pivot_scores(sequence, KEYS, plan=plan, cut=0, num_images=ONE).sum()

    gradient = jax.grad(total)(jnp.asarray(STATES, jnp.float32)[None])
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_displaces_text(bad):
    sequence = row(np.zeros((7, 2)), "tvvvvtt")
    scores = jnp.asarray([[bad, bad, 0.1, bad, 0.2, bad, 0.0]], jnp.float32)
    kept = select_entries(sequence, scores, num_kept=jnp.asarray([2]), num_text=3, num_visual=2)
    np.testing.assert_array_equal(kept.idx, [[0, 2, 4, 5, 6]])
    assert kept.valid.all()


def test_an_attention_mass_that_is_not_finite_keeps_the_least_or_the_most():
    plan = DecodePlan(layers=(1,), keep=(8,), budget_range=(0.25, 1.5), scale=(1.0,))
    sequence = jax.tree.map(
        lambda array: jnp.concatenate([array] * 3), row(np.zeros((15, 2)), "v" * 15)
    )
    kept = num_kept(
        jnp.asarray([jnp.nan, jnp.inf, 5.0]),
        sequence,
        plan=plan,
        cut=0,
        num_images=jnp.asarray([1, 1, 1]),
    )
    np.testing.assert_array_equal(kept, [2, 12, 5])
