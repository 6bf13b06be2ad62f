"""What must hold for every plan, whatever it keeps, on the smallest whole model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.pruning.budgets import Adaptive
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import IMAGE_TOKEN
from tests import tiny_model as tiny


@pytest.mark.parametrize("stage", ["encode", "fuse", "decode", "all", "adaptive"])
def test_keeping_everything_changes_no_logit(stage):
    batch, plan = tiny.make_batch(), tiny.keep_all()
    if stage == "adaptive":  # a K above what there is, so that the largest total is taken
        plan = plan.with_decoder_budgets([Adaptive(48, lambda_=1e6)] * 3)
    elif stage != "all":
        plan = dataclasses.replace(plan, steps=plan.stage(stage))
    full = tiny.forward(tiny.params(), batch, plan=PrunePlan()).logits
    kept = tiny.forward(tiny.params(), batch, plan=plan).logits
    mask = np.asarray(batch.text_valid)
    np.testing.assert_array_equal(np.asarray(kept)[mask], np.asarray(full)[mask])


def test_the_parameter_tree_does_not_depend_on_the_plan():
    batch = tiny.make_batch()
    init = functools.partial(tiny.MODEL.init, jax.random.key(0))
    shapes = [
        jax.eval_shape(functools.partial(init, plan=tiny.plan(text)), batch)
        for text in [*tiny.PLANS.values(), "only(encoders=clip)"]
    ]
    assert all(shape == shapes[0] for shape in shapes)


@pytest.mark.parametrize("text", ["meteor", "pyramiddrop", "stage 3"])
def test_kept_tokens_stay_in_order_and_invalid_ones_stand_last(text):
    trace = tiny.forward(tiny.params(), tiny.make_batch(), plan=tiny.plan(tiny.PLANS[text])).trace
    for encode in trace.encode.values():
        assert all((np.diff(kept, axis=1) > 0).all() for kept in encode.kept)
    place = np.asarray(trace.fused_encoder) * 1000 + np.asarray(trace.fused_patch_index)
    assert (np.diff(place, axis=1) > 0).all()
    before = [set(range(place.shape[1]))] * 3
    for cut in trace.prune_steps:
        for i, (visual, count) in enumerate(zip(np.asarray(cut.visual), cut.num_kept, strict=True)):
            assert (np.diff(visual[:count]) > 0).all() and (visual[count:] == -1).all()
            assert set(visual[:count]) <= before[i]
        before = [set(visual) for visual in np.asarray(cut.visual)]
        assert cut.num_kept[2] == 0  # the row without an image


def test_the_example_decides_how_many_tokens_it_keeps():
    plan = tiny.plan(tiny.METEOR)
    counts = np.stack(
        [
            tiny.forward(tiny.params(), tiny.make_batch(seed=seed), plan=plan)
            .trace.prune_steps[0]
            .num_kept
            for seed in range(6)
        ]
    )
    assert len(set(counts[:, :2].ravel().tolist())) > 1
    low, high = plan.decoder_steps[0].budget.bounds
    assert counts[:, :2].min() >= low and counts.max() <= high and (counts[:, 2] == 0).all()


def test_two_images_and_text_alone_share_a_batch():
    batch = tiny.make_batch(lengths=(12, 12, 12), with_image=(False, True, True))
    tokens = np.array(batch.tokens)
    tokens[2, 7] = IMAGE_TOKEN
    images = jnp.concatenate([batch.images, batch.images[::-1]], axis=1)
    two = batch.replace(
        tokens=jnp.asarray(tokens),
        images=images,
        image_valid=jnp.asarray([[False, False], [True, False], [True, True]]),
    )
    out = tiny.forward(tiny.params(), two, plan=tiny.plan(tiny.METEOR))
    kept = np.asarray(out.trace.prune_steps[-1].num_kept)
    assert kept[0] == 0 and 0 < kept[1] < kept[2]
    one = tiny.forward(tiny.params(), batch, plan=tiny.plan(tiny.METEOR))
    np.testing.assert_allclose(out.logits[:2], one.logits[:2], atol=2e-5, rtol=0)


def test_gradients_are_finite_and_reach_every_part():
    plan, batch = tiny.plan(tiny.METEOR).for_training(), tiny.make_batch()

    def loss(params):
        return (tiny.forward.__wrapped__(params, batch, plan=plan).logits ** 2).mean()

    gradients = jax.jit(jax.grad(loss))(tiny.params())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    for part, tree in gradients.items():
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(tree)), part


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random(keep=49)", "fuse.keep=49 but only 48"),
        ("meteor(encode=(33, 22, 30), fuse=20)", "between 0 and 32"),
        ("fastv(layer=2, keep=49)", "only 48 visual tokens"),
        ("meteor(fuse=20, layers=(2,), keep=(24,))", "only 20 visual tokens"),
        ("fastv(layer=9, keep=4)", "within 1..3"),
        ("only(encoders=sam)", "runs sam, but the model has"),
    ],
)
def test_a_plan_that_does_not_fit_says_so_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny.forward(tiny.params(), tiny.make_batch(), plan=tiny.plan(text))
    assert "\n" not in str(error.value)
