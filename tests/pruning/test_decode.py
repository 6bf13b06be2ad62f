"""What SparseVLM and DART choose in the decoder, on a row worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.eagle.prefill import pack_entries
from meteor_jax.pruning.budgets import Adaptive
from meteor_jax.pruning.method import ReductionContext, gather
from meteor_jax.pruning.methods import sparsevlm
from meteor_jax.pruning.methods.dart import Dart
from meteor_jax.pruning.methods.sparsevlm import SparseVLM
from meteor_jax.pruning.ops.select import keep_topk
from meteor_jax.types import Sequence

ONE = np.ones(1, np.int32)

# Each as one program, which is quicker than its operations one by one.
text_query_mask = jax.jit(sparsevlm.text_query_mask, static_argnames="num_text")
recycle_dropped = jax.jit(sparsevlm.recycle_dropped, static_argnames=("recycled", "clusters"))


def row(x, kinds):
    """A row of one example; `kinds` has t for text, v for visual tokens, - for padding."""
    visual, text_index = [], []
    texts = images = 0
    for kind in kinds:
        text_index.append(texts)
        visual.append(images if kind == "v" else -1)
        texts += kind == "t"
        images += kind == "v"
    count = len(kinds)
    return Sequence(
        x=np.float32(x)[None],
        position=np.arange(count, dtype=np.int32)[None],
        valid=np.array([kind != "-" for kind in kinds])[None],
        text_index=np.int32(text_index)[None],
        visual=np.int32(visual)[None],
    )


def test_raters_are_the_text_that_the_image_is_close_to():
    # Both visual tokens give 0.88 to the text at (1, 0); the text before the image is not asked.
    sequence = row([(9, 0), (2, 0), (2, 0), (0, 1), (1, 0), (0, 0)], "tvvtt-")
    raters = text_query_mask(sequence, num_text=4)
    np.testing.assert_array_equal(raters, [[False, False, True, False]])
    context = ReductionContext(sequence=sequence, num_text=4)
    np.testing.assert_array_equal(jax.jit(lambda: SparseVLM().begin(context=context))(), raters)

    @jax.jit
    def query_weights(context):
        return SparseVLM().query_weights(context=context)

    context = context.replace(state=raters)
    np.testing.assert_array_equal(query_weights(context), [[0, 0, 0, 0, 1, 0]])

    # They are the same text after a step, whose row is shorter.
    @jax.jit
    def shorter(sequence):
        left = gather(sequence.x, keep_topk(jnp.asarray([[1.0, 0, 1, 1, 1, 0]]), keep=4))
        return pack_entries(sequence, left)

    context = context.replace(sequence=shorter(sequence))
    np.testing.assert_array_equal(query_weights(context), [[0, 0, 0, 1]])


def test_where_all_text_is_equal_all_rate_and_without_an_image_none_matters():
    equal = row([(1, 0)] * 4, "vttt")
    np.testing.assert_array_equal(text_query_mask(equal, num_text=3), [[True, True, True]])
    alone = row([(1, 0), (0, 1)], "tt")
    assert np.isfinite(np.asarray(text_query_mask(alone, num_text=2), np.float32)).all()


# By angle: text, five visual tokens, two text tokens; the keys of 1 and 6 are the largest.
ANGLES = np.deg2rad([50, 0, 10, 120, 180, 270, 90, 300])
STATES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)
SIZES = np.float32([5, 4, 1, 2, 1, 1, 3, 1])
KEYS = SIZES[None, :, None, None] * np.float32([-1, 1])


@jax.jit
def pivot_scores(x, context):
    return Dart(pivots=(1, 1)).scores(x, context=context)


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
    sequence = row(STATES, "tvvvvvtt")
    context = ReductionContext(sequence=sequence, keys=KEYS, num_images=ONE, keep=keep)
    scores = pivot_scores(sequence.x, context)
    np.testing.assert_array_equal(np.flatnonzero(scores[0]), expected)


def test_recycling_by_hand():
    # Of seven visual tokens 5 is best. The next five cluster at 0 and 10; 50 is lost.
    x = np.array([[7.0], [50], [0], [5], [1], [3], [10], [11.5], [8]])
    sequence = row(x, "tvvvvvvvt")
    scores = np.float32([[0, 1, 6, 9, 5, 4, 3, 2, 0]])
    context = ReductionContext(
        sequence=sequence, num_images=ONE, max_images=2, num_kept=np.int32([3])
    )
    after, stays = recycle_dropped(sequence.x, scores, recycled=5, clusters=2, context=context)
    np.testing.assert_array_equal(np.flatnonzero(stays[0]), [2, 3, 6])
    expected = x[:, 0].copy()
    expected[[2, 6]] = 4 / 3, 10.75
    np.testing.assert_allclose(after[0, :, 0], expected, rtol=1e-6)


def test_how_many_are_recycled_is_sparsevlms_count():
    method = SparseVLM(recycle=0.3)
    assert method.recycling(keep=300, available=576) == (83, 9)  # 0.3 · 276 + 1, a tenth + 1
    assert method.recycling(keep=300, available=300) == (0, 0)
    assert SparseVLM(recycle=0.0).recycling(keep=300, available=576) == (0, 0)
    with pytest.raises(ValueError, match="keep more or recycle fewer"):
        method.recycling(keep=9, available=576)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseVLM(recycle=2.0), "a share from 0 to 1"),
        (lambda: Dart(pivots=(0, 0)), "one pivot at least"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_no_gradient_flows_through_a_choice():
    def total(x):
        sequence = row(STATES, "tvvvvvtt").replace(x=x)
        context = ReductionContext(sequence=sequence, keys=KEYS, num_images=ONE, keep=3)
        return pivot_scores(x, context).sum()

    gradient = jax.jit(jax.grad(total))(np.float32(STATES)[None])
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_displaces_text(bad):
    sequence = row(np.zeros((7, 2)), "tvvvvtt")
    scores = np.float32([[bad, bad, 0.1, bad, 0.2, bad, 0.0]])
    context = ReductionContext(sequence=sequence, num_kept=np.int32([2]), num_text=3, capacity=2)
    kept = jax.jit(lambda context, scores: context.keep_best(scores))(context, scores)
    np.testing.assert_array_equal(kept.idx, [[0, 2, 4, 5, 6]])
    assert kept.valid.all()


def test_a_budget_signal_that_is_not_finite_keeps_the_least_or_the_most():
    budget = Adaptive(8, budget_range=(0.25, 1.5), lambda_=1.0)
    run = jax.jit(budget.num_kept)
    signal, available = np.float32([np.nan, np.inf, 5]), np.full(3, 15, np.int32)
    kept = run(signal, num_images=np.ones(3, np.int32), available=available)
    np.testing.assert_array_equal(kept, [2, 12, 5])


def test_an_adaptive_budget_needs_lambda_and_a_signal():
    one = jnp.ones(1, int)
    with pytest.raises(ValueError, match="needs a measured λ; calibrate"):
        Adaptive(8).num_kept(jnp.ones(1), num_images=one, available=one)
    with pytest.raises(ValueError, match="needs a method that weighs each example"):
        Adaptive(8, lambda_=1.0).num_kept(None, num_images=one, available=one)
