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
from meteor_jax.pruning.plan import EncodePlan, PrunePlan
from meteor_jax.types import IMAGE_TOKEN
from tests import tiny_model as tiny

SPARSEVLM = "sparsevlm(layers=(1, 2, 3), keep=(24, 12, 6))"
PLANS = (SPARSEVLM, "visionzip(keep=14)", "divprune(keep=14)", "dart(layer=2, keep=11)")
KEEP_ALL = (
    "sparsevlm(layers=(1, 2, 3), keep=(48, 48, 48))",
    "visionzip(keep=48)",
    "divprune(keep=48)",
    "dart(layer=2, keep=48)",
)


# SparseVLM cuts three times: its programs take the longest of all to compile.
with_sparsevlm_long = pytest.mark.parametrize(
    "text", [pytest.param(SPARSEVLM, marks=pytest.mark.long), *PLANS[1:]]
)


@functools.cache
def forward_of(text):
    return tiny.forward(tiny.params(), tiny.make_batch(), plan=tiny.plan(text))


@with_sparsevlm_long
def test_kept_tokens_are_as_many_as_asked_and_in_order(text):
    plan, trace = tiny.plan(text), forward_of(text).trace
    place = np.asarray(trace.fused_encoder) * 1000 + np.asarray(trace.fused_raster)
    assert (np.diff(place, axis=1) > 0).all()
    assert place.shape[1] == (tiny.NUM_VISUAL if plan.decode else 14)
    for cut, keep in zip(trace.cuts, plan.decode.keep if plan.decode else (), strict=True):
        np.testing.assert_array_equal(cut.num_kept, [keep, keep, 0])  # the last has no image
        assert (np.diff(cut.visual[:2], axis=1) > 0).all()


@with_sparsevlm_long
def test_an_example_does_not_depend_on_its_batch_mates(text):
    plan, batch, together = tiny.plan(text), tiny.make_batch(), forward_of(text)
    for i in range(2):
        alone = tiny.forward(tiny.params(), tiny.row(batch, i), plan=plan)
        valid = np.asarray(batch.text_valid[i])
        np.testing.assert_allclose(
            alone.logits[0][valid], together.logits[i][valid], rtol=0, atol=2e-5
        )
        np.testing.assert_array_equal(alone.trace.fused_raster[0], together.trace.fused_raster[i])
        for one, all_ in zip(alone.trace.cuts, together.trace.cuts, strict=True):
            np.testing.assert_array_equal(one.visual[0], all_.visual[i])


@pytest.mark.parametrize("text", KEEP_ALL)
def test_keeping_everything_changes_no_logit(text):
    mask = np.asarray(tiny.make_batch().text_valid)
    full, kept = forward_of("full").logits, forward_of(text).logits
    np.testing.assert_array_equal(np.asarray(kept)[mask], np.asarray(full)[mask])


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
    for cut, keep in zip(out.trace.cuts, plan.decode.keep, strict=True):
        np.testing.assert_array_equal(cut.num_kept, [2 * keep, keep, 0])
    valid = np.asarray(batch.text_valid[1])
    np.testing.assert_allclose(
        out.logits[1][valid], forward_of(text).logits[1][valid], atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("encoder", [Clip(ClipConfig()), Sam(SamConfig()), Eva02(Eva02Config())])
def test_merging_counts_as_what_pruning_computes(encoder):
    """The likeness of each dropped token to those that gather the dropped, and their sums."""
    criteria = ("mean_token",) * 3  # without products of its own
    plan = EncodePlan(keep=(0, 0, 320), assignment="tokens", criteria=criteria, merged=0.25)
    cuts = plan.encoder_cuts({"encoder": encoder.config})["encoder"]
    assert cuts[-1].merged == 80
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), image)
    with counted_forms():
        encode = functools.partial(encoder.apply, cuts=cuts)
        flops, output = trace_flops(encode, variables, image)
    assert output.x.shape == (1, 320, encoder.config.width)
    scores = flops.grouped(lambda scope: "scores" if "scores" in scope.split("/") else "")["scores"]
    width = output.features[-1].shape[-1]
    assert scores == 2 * 2 * (encoder.config.num_tokens - 320) * 80 * width


def test_visionzip_shares_its_budget_by_tokens_and_gathers_the_rest():
    shapes = {name: tiny.CONFIG.encoder(name) for name in tiny.CONFIG.encoders}
    cuts = tiny.plan("visionzip(keep=24)").encode.encoder_cuts(shapes)
    assert {name: cut[-1].keep for name, cut in cuts.items()} == dict.fromkeys(shapes, 8)
    assert all(cut[-1].merged == 1 and cut[0].keep == 16 for cut in cuts.values())


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
