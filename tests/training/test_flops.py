"""The count of a training step against the program that it is a count of."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from meteor_jax.experiment.config import StageConfig
from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.models.eagle.cost import count_traced
from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.models.encoders.clip.model import ClipConfig
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig
from meteor_jax.models.layers import attention
from meteor_jax.pruning.baselines import parse_plan
from meteor_jax.pruning.plan import Calibration
from meteor_jax.training.flops import train_step_flops
from meteor_jax.training.optimizer import make_optimizer
from meteor_jax.training.state import init_params, make_state
from meteor_jax.training.step import make_train_step
from meteor_jax.types import Batch

CONFIG = MeteorConfig(
    encoders=("clip", "pix2struct"),
    clip=ClipConfig(
        image_size=112,
        patch_size=14,
        width=128,
        depth=3,
        num_heads=2,
        mlp_dim=512,
    ),
    pix2struct=Pix2StructConfig(
        grid_side=8, patch_size=14, width=128, depth=3, num_heads=2, mlp_dim=256, num_positions=16
    ),
    llama=LlamaConfig(
        depth=4,
        width=256,
        num_heads=2,
        num_kv_heads=2,
        mlp_dim=512,
        vocab_size=512,
        max_positions=1024,
    ),
    image_size=112,
)
ROWS, TEXT = 2, 96
RANKS = {"energy 0.99": dict.fromkeys(CONFIG.encoders, (40.0, 30.0, 20.0))}


def shapes(images):
    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct((ROWS, *sizes), dtype)

    side = CONFIG.image_size
    return Batch(
        images=shape(np.uint8, images, side, side, 3),
        image_valid=shape(np.bool_, images),
        tokens=shape(np.int32, TEXT),
        text_valid=shape(np.bool_, TEXT),
        labels=shape(np.int32, TEXT),
        example_id=shape(np.int32),
    )


@pytest.mark.parametrize(
    ("plan", "trainable", "images"),
    [
        ("full", (".*",), 1),
        ("full", ("projector",), 1),
        ("full", ("llama", "projector"), 2),
        ("meteor(encode=(60, 50, 40), fuse=32)", (".*",), 1),
    ],
)
def test_is_what_the_step_computes(plan, trainable, images, monkeypatch):
    """Within 3 %: the first layer of what trains needs no gradient of its inputs."""
    monkeypatch.setattr(attention, "CAUSAL_CHUNK", 1024)  # chunks skip keys that causality hides
    plan = parse_plan(plan).calibrated(Calibration(ranks=RANKS)).for_training()
    stage = StageConfig(steps=1, trainable=trainable)
    model, batch, optimizer = Meteor(CONFIG), shapes(images), make_optimizer(stage)
    params = jax.eval_shape(lambda batch: init_params(model, batch, seed=0), batch)
    state = jax.eval_shape(
        lambda params: make_state(
            params,
            optimizer=optimizer,
            trainable=trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=False,
        ),
        params,
    )
    step = make_train_step(model, optimizer=optimizer, plan=plan, stage=stage)
    counted = train_step_flops(CONFIG, plan, batch=batch, params=params, trainable=trainable)
    assert counted == pytest.approx(count_traced(without_waste(step), state, batch), rel=0.03)


def without_waste(function):
    """`function` less what its results do not need, which the compiler leaves out as well."""

    def pruned(*args):
        closed = jax.make_jaxpr(function)(*args)
        jaxpr, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        leaves = [leaf for leaf, use in zip(jax.tree.leaves(args), used, strict=True) if use]
        return jax.core.eval_jaxpr(jaxpr, closed.consts, *leaves)

    return pruned


def test_rematerialisation_does_not_count():
    batch, plan = shapes(1), parse_plan("full")
    remat = dataclasses.replace(
        CONFIG, llama=dataclasses.replace(CONFIG.llama, remat="nothing_saveable")
    )
    params = jax.eval_shape(lambda batch: init_params(Meteor(CONFIG), batch, seed=0), batch)
    options = {"batch": batch, "params": params, "trainable": (".*",)}
    assert train_step_flops(remat, plan, **options) == train_step_flops(CONFIG, plan, **options)
