"""EAGLE's own fusion: channels joined on one grid, one projector, and cuts by place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meteor_jax.models.eagle.cost import count_cost
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.models.eagle.projector import Projector
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import parse_plan
from tests import tiny_model as tiny

MODEL = Meteor(dataclasses.replace(tiny.CONFIG, fusion="pre"))


def init():
    return MODEL.init(jax.random.key(0), tiny.make_batch(), plan=PrunePlan())["params"]


def test_pre_projection_joins_channels_on_one_grid():
    params, batch = jax.eval_shape(init), tiny.make_batch()
    assert "projector" in params and "projector_clip" not in params

    def run(params, **arguments):
        return MODEL.apply({"params": params}, **arguments)

    tokens = jax.eval_shape(
        functools.partial(run, plan=PrunePlan(), method="encode_images"),
        params,
        images=batch.images[:, 0],
    ).tokens
    assert tokens.x.shape == (3, 16, 32)
    with pytest.raises(ValueError, match="fusion='post'"):
        jax.eval_shape(functools.partial(run, plan=tiny.plan(tiny.METEOR)), params, batch=batch)


def test_pre_projection_is_pruned_place_by_place_without_training():
    """What runs on EAGLE's own weights: places that the encoders agree on go, then stage 3."""
    params, batch = jax.jit(init)(), tiny.make_batch()

    @functools.partial(jax.jit, static_argnames="text")
    def encode(params, text):
        return MODEL.apply(
            {"params": params}, batch.images[:, 0], plan=parse_plan(text), method="encode_images"
        )

    whole, cut = encode(params, "full").tokens, encode(params, "meteor(fuse=6)").tokens
    assert cut.x.shape == (3, 6, 32)
    assert (np.diff(cut.patch_index, axis=1) > 0).all()
    places = np.asarray(cut.patch_index)[..., None]
    np.testing.assert_array_equal(cut.x, np.take_along_axis(np.asarray(whole.x), places, axis=1))
    np.testing.assert_array_equal(encode(params, "meteor(fuse=16)").tokens.x, whole.x)

    @functools.partial(jax.jit, static_argnames="plan")
    def tokens(params, plan):
        return MODEL.apply(
            {"params": params}, batch.images[:, 0], plan=plan, method="encode_images"
        ).tokens

    once, again = (parse_plan(f"meteor(fuse={keep})") for keep in (6, 3))
    twice = tokens(params, dataclasses.replace(once, steps=once.steps + again.steps))
    assert twice.x.shape == (3, 3, 32) and (np.diff(twice.patch_index, axis=1) > 0).all()
    assert np.isin(twice.patch_index, cut.patch_index).all()
    with pytest.raises(ValueError, match=r"fuse\.num_iterations=1"):
        encode(params, "meteor(fuse=6, fuse.num_iterations=2)")

    # Each encoder's part of the projector's first layer is what the scores compare.
    cost = dict(count_cost(MODEL.config, parse_plan("meteor(fuse=6)")).rows)
    width = sum(MODEL.config.encoder(name).width for name in MODEL.config.encoders)
    assert cost["projector"] == 2 * 16 * 32 * (width + 32)
    assert cost["scores"] == 2 * 16 * 32 * (width + len(MODEL.config.encoders))


def test_projector_parts_sum_to_the_first_layer():
    def projected_parts(module):
        features = [jnp.ones((1, 2, 4)), jnp.full((1, 2, 3), 2.0)]
        return sum(module.parts(features)), module.fc1(jnp.concatenate(features, -1))

    projector = Projector(8)
    variables = projector.init(jax.random.key(1), jnp.zeros((1, 2, 7)))
    parts, first_layer = projector.apply(variables, method=projected_parts)
    np.testing.assert_allclose(parts, first_layer, atol=1e-6)  # the bias starts at 0
