"""SparseVLM, VisionZip, DivPrune and DART through the smallest whole model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.encoders.clip.model import Clip, ClipConfig
from meteor_jax.models.encoders.eva02.model import Eva02, Eva02Config
from meteor_jax.models.encoders.sam.model import Sam, SamConfig
from meteor_jax.models.flops import counted_forms, trace_flops
from meteor_jax.pruning.encoder_steps import EncoderStep
from meteor_jax.pruning.methods.visionzip import VisionZip
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.points import Point
from meteor_jax.types import IMAGE_TOKEN
from tests import tiny_model as tiny

SPARSEVLM = "sparsevlm(layers=(1, 2, 3), keep=(24, 12, 6))"
PLANS = (SPARSEVLM, "visionzip(keep=14)", "divprune(keep=14)", "dart(layer=2, keep=11)")

# SparseVLM prunes three times: its programs take the longest of all to compile.
with_sparsevlm_long = pytest.mark.parametrize(
    "text", [pytest.param(SPARSEVLM, marks=pytest.mark.long), *PLANS[1:]]
)


@functools.cache
def forward_of(text):
    return tiny.forward(tiny.params(), tiny.make_batch(), plan=tiny.plan(text))


@with_sparsevlm_long
def test_kept_tokens_are_as_many_as_asked_and_in_order(text):
    plan, trace = tiny.plan(text), forward_of(text).trace
    place = np.asarray(trace.fused_encoder) * 1000 + np.asarray(trace.fused_patch_index)
    assert (np.diff(place, axis=1) > 0).all()
    assert place.shape[1] == (tiny.NUM_VISUAL if plan.decoder_steps else 14)
    for step, left in zip(plan.decoder_steps, trace.prune_steps, strict=True):
        keep = step.budget.keep
        np.testing.assert_array_equal(left.num_kept, [keep, keep, 0])  # the last has no image
        assert (np.diff(left.visual[:2], axis=1) > 0).all()


@with_sparsevlm_long
def test_dropping_something_changes_the_answer(text):
    assert np.abs(forward_of(text).logits[0] - forward_of("full").logits[0]).max() > 1e-3


@pytest.mark.parametrize(
    "text", [pytest.param(SPARSEVLM, marks=pytest.mark.long), "dart(layer=2, keep=11)"]
)
def test_two_images_get_two_budgets(text):
    batch = tiny.make_batch()
    tokens = np.array(batch.tokens)
    tokens[0, 7] = IMAGE_TOKEN
    two = batch.replace(
        tokens=jnp.asarray(tokens),
        images=jnp.concatenate([batch.images] * 2, axis=1),
        image_valid=jnp.asarray([[True, True], [True, False], [False, False]]),
    )
    plan = tiny.plan(text)
    out = tiny.forward(tiny.params(), two, plan=plan)
    for step, left in zip(plan.decoder_steps, out.trace.prune_steps, strict=True):
        keep = step.budget.keep
        np.testing.assert_array_equal(left.num_kept, [2 * keep, keep, 0])
    valid = np.asarray(batch.text_valid[1])
    np.testing.assert_allclose(
        out.logits[1][valid], forward_of(text).logits[1][valid], atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("encoder", [Clip(ClipConfig()), Sam(SamConfig()), Eva02(Eva02Config())])
def test_merging_counts_as_what_pruning_computes(encoder):
    """The likeness of each dropped token to those that gather the dropped, and their sums."""
    method = VisionZip(merge_share=0.25)
    assert method.num_merge_targets(320) == 80
    step = EncoderStep(Point("encoder", "segment", 3), 320, method)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), image)

    def scores(method):
        with counted_forms():
            encode = functools.partial(
                encoder.apply, steps=(dataclasses.replace(step, method=method),)
            )
            flops, output = trace_flops(encode, variables, image)
        assert output.x.shape == (1, 320, encoder.config.width)
        return flops.grouped(lambda scope: "scores" in scope.split("/"))[True]

    added = scores(method) - scores(VisionZip(merge_share=0.0))  # attention that both ask for
    width = encoder.config.token_width
    assert added == 2 * 2 * (encoder.config.num_tokens - 320) * 80 * width


def test_visionzip_shares_its_budget_by_tokens_and_gathers_the_rest():
    shapes = {name: tiny.CONFIG.encoder(name) for name in tiny.CONFIG.encoders}
    steps = tiny.plan("visionzip(keep=24)").encoder_steps(shapes)
    assert {name: step.keep for name, (step,) in steps.items()} == dict.fromkeys(shapes, 8)
    assert all(step.method.num_merge_targets(8) == 1 for (step,) in steps.values())


def test_plans_of_the_encoders_need_post_projection_fusion():
    model = type(tiny.MODEL)(dataclasses.replace(tiny.CONFIG, fusion="pre"))
    batch = tiny.make_batch()
    with pytest.raises(ValueError, match="use fusion='post'"):
        jax.eval_shape(
            functools.partial(model.init, plan=tiny.plan("visionzip(keep=14)")),
            jax.random.key(0),
            batch,
        )
    assert PrunePlan.from_json(tiny.plan(SPARSEVLM).to_json()) == tiny.plan(SPARSEVLM)
