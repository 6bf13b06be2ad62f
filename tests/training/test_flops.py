"""What a training step is said to cost, against the programs that it takes."""

import functools

import jax
import pytest

from meteor_jax.experiment.config import StageConfig
from meteor_jax.models.eagle.cost import count_cost
from meteor_jax.models.family import build_model
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.training.flops import train_step_flops
from meteor_jax.training.optimizer import make_optimizer
from meteor_jax.training.state import make_state
from meteor_jax.training.step import make_train_step
from tests import tiny_model as tiny

HEAD = 2 * tiny.TEXT_LENGTH * tiny.CONFIG.llama.width * tiny.VOCAB


@functools.cache
def count(config=tiny.CONFIG, *, trainable=(".*",), **options):
    stage = StageConfig(steps=1, trainable=trainable, **options)
    model, batch, optimizer = (
        build_model(config),
        tiny.make_batch(lengths=(12,) * 4, with_image=(True,) * 4),
        make_optimizer(stage),
    )

    def fresh(batch):
        return make_state(
            model.init_params(batch, seed=0),
            optimizer=optimizer,
            trainable=trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=False,
        )

    step = make_train_step(model, optimizer=optimizer, plan=PrunePlan(), stage=stage)
    return train_step_flops(step, jax.eval_shape(fresh, batch), batch) / 4


@pytest.fixture(scope="module")
def forward():
    cost = count_cost(tiny.CONFIG, PrunePlan(), text_tokens=tiny.TEXT_LENGTH)
    return cost.total_flops + HEAD


def test_all_that_trains_costs_three_forward_passes(forward):
    """Itself, its weights' and its inputs' gradients, but no gradients of the pixels."""
    assert 2.85 * forward < count() < 3 * forward


def test_frozen_parts_need_no_gradients_of_their_weights(forward):
    config = tiny.CONFIG.llama
    parts = dict(count_cost(tiny.CONFIG, PrunePlan(), text_tokens=tiny.TEXT_LENGTH).rows)
    entries = tiny.NUM_VISUAL + tiny.TEXT_LENGTH
    expected = forward + parts["projector"] + parts["llm"] + HEAD
    expected += 4 * config.depth * entries**2 * config.width  # attention's products have two inputs
    expected += 2 * tiny.NUM_VISUAL * config.width**2  # the second layers of the projectors
    assert count(trainable=("projector",)) == expected


@pytest.mark.parametrize("change", ["remat", "parts"])
def test_how_a_step_is_computed_does_not_count(change):
    if change == "parts":
        assert count(grad_accum_steps=2) == count()
        return
    assert count(build_model(tiny.CONFIG).with_remat("nothing_saveable")) == count()
