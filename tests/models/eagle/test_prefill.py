"""What the decoder computes under an adaptive budget, and what it keeps room for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.eagle.cost import count_cost
from meteor_jax.pruning.budgets import Adaptive, Fixed
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import override
from tests import tiny_model as tiny
from tests.executed import count_executed

ROWS, TEXT = 8, 60
ADAPTIVE = tiny.plan(
    "meteor(fuse=48, layers=(1,), keep=(14,), decode.heads=2, decode.lambda_=8.6)"
).without("fuse")


@pytest.fixture(scope="module")
def prompts():
    """Eight prompts about eight images, and their visual tokens. The longer a question, the less
    it looks at its image, and the fewer tokens it keeps."""
    batch = tiny.make_batch(
        lengths=(5, 60, 30, 8, 55, 12, 20, 45), with_image=(True,) * ROWS, text_length=TEXT
    )
    return batch, tiny.encode(tiny.params(), batch.images, plan=ADAPTIVE).tokens


def prefill(plan, visual, batch):
    return tiny.prefill(tiny.params(), visual, batch, plan=plan, max_new_tokens=4)


def traced(plan):
    """The same without its own jit, for what reads the program."""
    return lambda visual, batch: tiny.prefill.__wrapped__(
        tiny.params(), visual, batch, plan=plan, max_new_tokens=4
    )


def executed(plan, visual, batch):
    return count_executed(traced(plan), visual, batch)


def fixed(keep):
    return ADAPTIVE.with_decoder_budgets([Fixed(keep)])


def test_a_batch_computes_what_its_rows_keep_on_average(prompts):
    batch, visual = prompts
    kept = np.asarray(prefill(ADAPTIVE, visual, batch).prune_steps[0].num_kept)
    mean = kept.mean()
    assert kept.max() > mean + 2 and kept.min() < mean - 2  # one hard row must not lift all
    before = executed(fixed(int(mean)), visual, batch)
    step = executed(fixed(int(mean) + 1), visual, batch) - before
    at_mean = before + (mean % 1) * step
    # Attention alone is that of the longest row there may be, which here is half of a layer.
    assert executed(ADAPTIVE, visual, batch) < at_mean + 5.5 * step


def test_what_is_reported_is_what_ran(prompts):
    batch, visual = prompts
    step = prefill(ADAPTIVE, visual, batch).prune_steps[0]
    ran = executed(ADAPTIVE, visual, batch) / ROWS
    head = 2 * tiny.CONFIG.llama.width * tiny.VOCAB
    cost = count_cost(
        tiny.CONFIG,
        ADAPTIVE,
        text_tokens=TEXT,
        rows=ROWS,
        computed=(float(step.num_computed[0]),),
    )
    parts = dict(cost.rows)
    assert parts["llm"] + parts["scores"] + head == pytest.approx(ran, rel=1e-9)


def test_a_step_that_can_drop_nothing_costs_nothing(prompts):
    batch, visual = prompts
    unpruned = executed(PrunePlan(), visual, batch)
    assert executed(fixed(48), visual, batch) == unpruned
    (step,) = prefill(fixed(48), visual, batch).prune_steps
    assert (np.asarray(step.num_kept) == 48).all()


@pytest.mark.parametrize("edges", [(12.0, 14.0), (20.0,), ()])
def test_rows_do_not_depend_on_the_total_that_they_are_packed_into(prompts, edges):
    batch, visual = prompts
    budget = Adaptive(14, lambda_=8.6, edges=((1, edges),), num_totals=1 + len(edges))
    plan = ADAPTIVE.with_decoder_budgets([budget])
    together = prefill(plan, visual, batch)
    for row in range(ROWS):
        alone = prefill(plan, tiny.row(visual, row), tiny.row(batch, row))
        np.testing.assert_allclose(alone.logits[0], together.logits[row], rtol=0, atol=2e-5)
        assert alone.prune_steps[0].num_kept[0] == together.prune_steps[0].num_kept[row]
        for one, all_ in zip(alone.cache.ranges, together.cache.ranges, strict=True):
            held = np.asarray(one.valid[0])
            np.testing.assert_array_equal(held, all_.valid[row])
            np.testing.assert_allclose(
                np.asarray(one.k)[:, 0, held], np.asarray(all_.k)[:, row, held], rtol=0, atol=2e-5
            )


def test_a_row_that_is_not_finite_stays_alone(prompts):
    batch, visual = prompts
    x = np.array(visual.x)
    x[2] = np.nan
    whole = prefill(ADAPTIVE, visual, batch)
    logits = prefill(ADAPTIVE, visual.replace(x=x), batch).logits
    others = np.arange(ROWS) != 2
    assert np.isnan(np.asarray(logits)[2]).any()
    np.testing.assert_allclose(
        np.asarray(logits)[others], np.asarray(whole.logits)[others], rtol=0, atol=2e-5
    )


def test_a_full_cache_is_never_overwritten():
    """Four tokens, one by one, into room for two."""
    batch, plan = tiny.make_batch(), tiny.plan("full")
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    prefilled = tiny.prefill(tiny.params(), visual, batch, plan=plan, max_new_tokens=2)
    cache = prefilled.cache
    keys = []
    for token in (5, 6, 7, 8):
        extended = tiny.extend(tiny.params(), cache, jnp.full((3, 1), token, jnp.int32))
        cache = extended.cache
        keys.append(np.asarray(cache.ranges[0].k))
    np.testing.assert_array_equal(keys[3], keys[1])
    assert np.isnan(np.asarray(extended.logits)).all()  # said loudly, and by name:
    assert cache.overflowed and cache.cache_index == 2


def test_more_tokens_than_there_is_room_for_are_refused_where_shapes_show_it():
    batch, plan = tiny.make_batch(), tiny.plan("full")
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    prefilled = tiny.prefill(tiny.params(), visual, batch, plan=plan, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"at most 2 more tokens, .* got 3; raise max_new_tokens"):
        tiny.extend(tiny.params(), prefilled.cache, jnp.zeros((3, 3), jnp.int32))
    used = tiny.extend(tiny.params(), prefilled.cache, jnp.zeros((3, 1), jnp.int32)).cache
    with pytest.raises(ValueError, match=r"at most 1 more tokens, .* got 2"):
        tiny.extend.__wrapped__(tiny.params(), used, jnp.zeros((3, 2), jnp.int32))


def test_a_trimmed_cache_answers_the_same():
    plan, batch = tiny.plan(tiny.METEOR), tiny.make_batch()
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    cache = tiny.prefill(tiny.params(), visual, batch, plan=plan, max_new_tokens=2).cache
    assert cache.num_lengths == 2
    short = jax.jit(lambda cache: cache.trim(0))(cache)
    fits = [
        layers.valid[:, : small.valid.shape[1] - 2].sum() == layers.valid.sum()
        for layers, small in zip(cache.ranges, short.ranges, strict=True)
    ]
    assert all(fits) and short.ranges[1].k.shape[2] < cache.ranges[1].k.shape[2]
    tokens = jnp.full((3, 1), 7, jnp.int32)
    np.testing.assert_allclose(
        tiny.extend(tiny.params(), short, tokens).logits,
        tiny.extend(tiny.params(), cache, tokens).logits,
        rtol=0,
        atol=1e-5,
    )


def test_totals_share_most_of_the_program():
    """Three totals at three steps: three copies of a layer each, and all else once."""
    batch, adaptive = (
        tiny.make_batch(),
        tiny.plan("meteor(fuse=48, layers=(1, 2, 3), keep=(24, 16, 8), decode.lambda_=9.0)"),
    )
    visual = jax.eval_shape(lambda: tiny.encode(tiny.params(), batch.images, plan=adaptive).tokens)

    def lines(plan):
        run = jax.jit(traced(plan))
        return len(run.lower(visual, batch).compile().as_text().splitlines())

    fixed = override(adaptive, **{"decode.budget": "fixed"})
    assert lines(adaptive) < 1.6 * lines(fixed)
