"""What a method or a plan can do beside dropping tokens, on the smallest whole model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.config import ConfigError, build
from meteor_jax.experiment.config import StageConfig
from meteor_jax.models.family import build_model
from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.method import Method
from meteor_jax.pruning.methods.random import Random
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import FUSION
from meteor_jax.training.optimizer import make_optimizer
from meteor_jax.training.state import make_state
from meteor_jax.training.step import make_train_step
from meteor_jax.types import IGNORE_LABEL
from tests import tiny_model as tiny

NEW = jnp.asarray([[7, 8], [9, 4], [5, 6]], jnp.int32)


def decode(text, *, visual=None):
    """Logits of the prompt and of two tokens after it, and the cache."""
    plan, batch = tiny.plan(text), tiny.make_batch()
    if visual is None:
        visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    read = tiny.prefill(tiny.params(), visual, batch, plan=plan, max_new_tokens=2)
    return np.asarray(read.logits), tiny.extend(tiny.params(), read.cache, NEW).logits, read.cache


def test_caches_of_earlier_layers_lose_what_a_step_drops():
    text = "fastv(layer=2, keep=7{})"
    logits, whole, cache = decode(text.format(""))
    same, cut, short = decode(text.format(", decode.cut_caches=True"))
    np.testing.assert_array_equal(same, logits)  # the prompt had been read
    assert cache.ranges[0].k.shape[2] == 12 + 48 + 2
    assert short.ranges[0].k.shape[2] == short.ranges[1].k.shape[2] == 12 + 7 + 2
    np.testing.assert_array_equal(short.ranges[0].valid, short.ranges[1].valid)
    assert np.abs(cut[0] - whole[0]).max() > 1e-3  # and new tokens see less
    np.testing.assert_allclose(cut[2], whole[2], rtol=0, atol=1e-5)  # a row without an image


def test_a_cut_cache_holds_the_same_tokens_through_several_steps():
    """Of two steps the last cuts all caches: to the entries that the last range has."""
    text = "pyramiddrop(layers=(1, 3), keep=(20, 6), decode.cut_caches=(False, True))"
    plan, batch = tiny.plan(text), tiny.make_batch()
    visual = tiny.encode(tiny.params(), batch.images, plan=plan).tokens
    read = functools.partial(tiny.prefill, tiny.params(), visual, batch, max_new_tokens=2)
    uncut = read(plan=tiny.plan(text.replace("True", "False"))).cache
    first, second, last = read(plan=plan).cache.ranges
    assert first.k.shape[2] == second.k.shape[2] == last.k.shape[2] == 12 + 6 + 2
    # Which entries these are, the keys of the uncut caches tell.
    for cut, whole in zip((first, second), uncut.ranges, strict=False):
        for row in range(3):
            held = np.asarray(cut.k)[0, row, np.asarray(cut.valid[row])].reshape(-1, 16)
            there = np.asarray(whole.k)[0, row].reshape(-1, 16)
            assert (np.abs(held[:, None] - there[None]).max(-1).min(-1) == 0).all()


def test_tokens_leave_before_the_decoders_end():
    """A budget of 0: the layers after it see the text alone."""
    _, _, cache = decode("fastv(layer=2, keep=0)")
    assert cache.ranges[1].k.shape[2] == 12 + 2
    trace = tiny.forward(
        tiny.params(), tiny.make_batch(), plan=tiny.plan("fastv(layer=2, keep=0)")
    ).trace
    np.testing.assert_array_equal(trace.prune_steps[0].num_kept, 0)


def test_tokens_enter_at_a_later_layer():
    full, late = decode("full"), decode("full(enter_at=2)")
    assert [r.k.shape[:3] for r in late[2].ranges] == [(2, 3, 14), (2, 3, 62)]
    assert np.abs(late[0][0] - full[0][0]).max() > 1e-3
    np.testing.assert_allclose(late[0][2], full[0][2], rtol=0, atol=1e-5)  # without an image
    np.testing.assert_allclose(late[1][2], full[1][2], rtol=0, atol=1e-5)
    # Before layer 2 the image says nothing: other pixels, the same states of the text there.
    batch = tiny.make_batch()
    visual = tiny.encode(tiny.params(), batch.images[::-1], plan=PrunePlan()).tokens
    other = decode("full(enter_at=2)", visual=visual)
    valid = np.asarray(late[2].ranges[0].valid)[:, :12]
    before, after = (np.asarray(of[2].ranges[0].k)[:, :, :12] for of in (late, other))
    np.testing.assert_array_equal(before[:, valid], after[:, valid])
    assert np.abs(other[2].ranges[1].k - late[2].ranges[1].k).max() > 1e-3


def test_what_enters_late_is_pruned_after_it_has_entered():
    plan = tiny.plan("fastv(layer=3, keep=5, enter_at=1)")
    trace = tiny.forward(tiny.params(), tiny.make_batch(), plan=plan).trace
    np.testing.assert_array_equal(trace.prune_steps[0].num_kept, [5, 5, 0])
    with pytest.raises(ConfigError, match="prune after they have entered"):
        tiny.plan("fastv(layer=1, keep=5, enter_at=1)")


@dataclasses.dataclass(frozen=True)
class Sparse(Method):
    """Keeps the longest tokens, and asks for short ones."""

    stages = ("encode", "fuse")
    weight: float = 1.0

    def scores(self, x, *, context):
        return jnp.linalg.norm(x, axis=-1)

    def select(self, x, scores, *, context):
        left = super().select(x, scores, context=context)
        return left.replace(loss=self.weight * scores.mean(1))


def test_a_method_adds_a_term_to_the_training_loss():
    stage = build(StageConfig, {"steps": 2, "batch_size": 4, "learning_rate": 0.0})
    optimizer, batch = (
        make_optimizer(stage),
        tiny.make_batch(lengths=(9,) * 4, with_image=(True,) * 4),
    )
    batch = batch.replace(labels=jnp.maximum(batch.labels, IGNORE_LABEL))

    def loss(weight, parts):
        steps = (
            Step("clip.segment1", Sparse(weight), Fixed(9)),
            Step(FUSION, Sparse(weight), Fixed(9)),
        )
        state = make_state(
            jax.tree.map(jnp.copy, tiny.params()),
            optimizer=optimizer,
            trainable=stage.trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=False,
        )
        step = make_train_step(
            build_model(tiny.CONFIG),
            optimizer=optimizer,
            plan=PrunePlan(steps=steps),
            stage=dataclasses.replace(stage, grad_accum_steps=parts),
        )
        return float(step(state, batch)[1]["loss"])

    plain, added = loss(0.0, 1), loss(0.5, 1)
    assert added > plain + 0.1
    assert loss(0.5, 2) == pytest.approx(added, rel=1e-5)  # a mean, however it is accumulated


@dataclasses.dataclass(frozen=True)
class TrainedRandom(Random):
    in_training = True


def test_a_method_of_the_decoder_may_act_in_training():
    plan = PrunePlan(
        steps=(
            Step("decoder.layer1", TrainedRandom(), Fixed(20)),
            Step("decoder.layer2", Random(), Fixed(9)),
        )
    )
    assert plan.for_training() == PrunePlan(steps=plan.steps[:1])
    batch = tiny.make_batch()

    def loss(params):
        out = tiny.forward.__wrapped__(params, batch, plan=plan.for_training())
        return (out.logits**2).mean(), out.trace

    gradients, trace = jax.jit(jax.grad(loss, has_aux=True))(tiny.params())
    np.testing.assert_array_equal(trace.prune_steps[0].num_kept, [20, 20, 0])
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all()
    assert np.abs(gradients["clip"]["patch_embedding"]["kernel"]).max() > 0
