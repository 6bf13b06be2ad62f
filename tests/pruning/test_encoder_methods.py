"""What methods leave of the tokens of one encoder, on examples worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.encoders.tokens import EncoderTokens, prune_tokens
from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.method import ReductionContext
from meteor_jax.pruning.methods.attention_received import AttentionReceived
from meteor_jax.pruning.methods.mean_token import MeanToken
from meteor_jax.pruning.methods.random import Random
from meteor_jax.pruning.methods.uniform import Uniform
from meteor_jax.pruning.ops.similarity import mean_token_similarity
from meteor_jax.pruning.points import Point

# Six tokens whose mean is (1, 0): cosines with it 1, 1, 0.6, 0.6, −1 and 0 by hand.
SIX = np.array([[[2, 0], [4, 0], [0.75, 1], [0.75, -1], [-1.5, 0], [0, 0]]], np.float32)
PATCH_INDEX = np.array([[10, 11, 12, 13, 14, 15]], np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def pruned(keep, method, *, x=SIX, patch_index=PATCH_INDEX, **context):
    """The tokens that a step leaves, and their patch indices."""
    tokens = EncoderTokens(
        x=jnp.asarray(x), patch_index=jnp.asarray(patch_index), window_sizes=(x.shape[1],)
    )
    step = EncoderStep(Point("encoder", "segment", 1), keep, method)
    left = prune_tokens(tokens, step, context=ReductionContext(**context))
    return left.x, left.patch_index


def test_mean_token_by_hand():
    found = jax.jit(mean_token_similarity)(SIX)
    np.testing.assert_allclose(found, [[1, 1, 0.6, 0.6, -1, 0]], atol=1e-6)


def test_mean_token_keeps_the_least_redundant():
    x, patch_index = pruned(4, MeanToken())
    np.testing.assert_array_equal(patch_index, [[12, 13, 14, 15]])
    np.testing.assert_array_equal(x, SIX[:, 2:])


@pytest.mark.parametrize("queries", ["all", "cls"])
def test_attention_keeps_the_most_looked_at(queries):
    scores = np.float32([[0.1, 0.5, 0.0, 0.2, 0.9, 0.3]])
    field = {"all": "attention_received", "cls": "cls_attention"}[queries]
    _, patch_index = pruned(3, AttentionReceived(queries), **{field: scores})
    np.testing.assert_array_equal(patch_index, [[11, 14, 15]])


def test_without_attention_the_mean_token_decides():
    np.testing.assert_array_equal(pruned(4, AttentionReceived())[1], pruned(4, MeanToken())[1])


@pytest.mark.parametrize(("keep", "places"), [(1, [3]), (2, [1, 4]), (3, [1, 3, 5])])
def test_uniform_stride(keep, places):
    np.testing.assert_array_equal(pruned(keep, Uniform())[1], PATCH_INDEX[:, places])


@pytest.mark.parametrize(("num_tokens", "keep"), [(36, 35), (36, 20), (100, 99), (7, 4)])
def test_uniform_keeps_exactly_as_many_as_asked(num_tokens, keep):
    index = np.arange(num_tokens)[None]
    _, kept = pruned(keep, Uniform(), x=np.ones((1, num_tokens, 1)), patch_index=index)
    gaps = np.diff(np.asarray(kept)[0])
    assert set(gaps) <= {num_tokens // keep, num_tokens // keep + 1}


def test_random_depends_on_the_image_and_the_seed_alone():
    def kept(image_seed, seed=0):
        rows = len(image_seed)
        index = np.broadcast_to(np.arange(50), (rows, 50))
        seeds = np.asarray(image_seed, np.uint32)
        return np.asarray(
            pruned(20, Random(seed), x=np.ones((rows, 50, 2)), patch_index=index, image_seed=seeds)[
                1
            ]
        )

    one = kept([7, 4_000_000_000, 7])
    assert (one[0] != one[1]).any()
    np.testing.assert_array_equal(one[0], one[2])
    np.testing.assert_array_equal(kept([4_000_000_000])[0], one[1])
    assert (kept([7], seed=4_000_000_000)[0] != one[0]).any()


def test_keeping_all_gives_the_inputs_back():
    x, index = jnp.asarray(SIX), jnp.asarray(PATCH_INDEX)
    same_x, same_index = pruned.__wrapped__(6, AttentionReceived(), x=x, patch_index=index)
    assert same_x is x and same_index is index


def test_no_gradient_through_the_scores():
    def kept_sum(x):
        return pruned(4, MeanToken(), x=x)[0].sum()

    expected = np.zeros_like(SIX)
    expected[:, 2:] = 1.0  # a gather, nothing else
    np.testing.assert_array_equal(jax.grad(kept_sum)(SIX), expected)


def test_bad_steps():
    with pytest.raises(ValueError, match="at least 1"):
        pruned(0, MeanToken())
    with pytest.raises(ValueError, match="7 of 6"):
        pruned(7, MeanToken())
    with pytest.raises(ValueError, match="needs image_seed"):
        pruned(3, Random())
    with pytest.raises(ValueError, match="segments are 1 to 3"):
        EncoderStep(Point("clip", "segment", 4), 3, MeanToken())


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_token_that_is_not_finite_is_dropped_first(bad):
    x = np.insert(SIX, 2, [[bad, 1.0]], axis=1)
    index = np.arange(7, dtype=np.int32)[None]
    _, kept = pruned(4, MeanToken(), x=x, patch_index=index)
    np.testing.assert_array_equal(kept, [[3, 4, 5, 6]])  # those of SIX alone
    _, kept = pruned(6, MeanToken(), x=x, patch_index=index)
    np.testing.assert_array_equal(kept, [[0, 1, 3, 4, 5, 6]])
