"""One step: what trains, by how much, and that it compiles once."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from meteor_jax.config import build
from meteor_jax.experiment.config import StageConfig
from meteor_jax.models.family import build_model
from meteor_jax.pruning.text import parse_plan
from meteor_jax.training.init import make_steps
from meteor_jax.training.optimizer import make_optimizer, make_schedule
from meteor_jax.training.state import make_state
from meteor_jax.training.step import make_train_step
from tests import tiny_model
from tests.training import tiny_run
from tests.training.tiny_run import TinyFamily, make_batch, make_experiment

FULL = parse_plan("full")


@pytest.fixture(autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_stage(**fields):
    return build(StageConfig, {"steps": 10, "batch_size": 8, "learning_rate": 1e-2} | fields)


def begin(stage, *, ema_decay=0.0):
    """(step, state) for a stage of the tiny model; the step's program is shared by equal stages."""
    step, fresh = compiled(stage, ema_decay=ema_decay)
    return step, fresh()


@functools.cache
def compiled(stage, *, ema_decay):
    model, optimizer = TinyFamily(), make_optimizer(stage)

    def fresh():
        return make_state(
            model.init_params(make_batch(0), seed=0),
            optimizer=optimizer,
            trainable=stage.trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=ema_decay > 0,
        )

    step = make_train_step(
        model,
        optimizer=optimizer,
        plan=FULL,
        stage=stage,
        ema_decay=ema_decay,
    )
    return step, jax.jit(fresh)


def moved(stage, **options):
    """By path, how far one step moves each parameter."""
    step, state = begin(stage, **options)
    before = flatten_dict(jax.device_get(state.params), sep="/")
    state, _ = step(state, make_batch(1))
    after = flatten_dict(jax.device_get(state.params), sep="/")
    return {path: np.abs(after[path] - before[path]).max() for path in before}


def test_frozen_parameters_stay_and_take_no_optimizer_state():
    stage = make_stage(trainable=("llama",), weight_decay=0.1)
    distance = moved(stage)
    assert all((d > 0) == path.startswith("llama") for path, d in distance.items())
    _, state = begin(stage)
    assert set(state.opt_state[1].mu) == {"llama/embedding/embedding", "llama/head/kernel"}


def test_frozen_subtree_is_not_differentiated():
    flops = []
    for trainable in ((".*",), ("llama/head",)):
        step, state = begin(make_stage(trainable=trainable))
        flops.append(step.lower(state, make_batch(0)).compile().cost_analysis()["flops"])
    assert flops[1] < 0.7 * flops[0]


def test_learning_rates_by_path():
    # Adam's first step is as long as the learning rate, whatever the gradient.
    distance = moved(make_stage(lr_multipliers=(("clip/fc2", 0.1), ("clip", 0.5))))
    assert distance["llama/head/kernel"] == pytest.approx(1e-2, rel=1e-2)
    assert distance["clip/fc1/kernel"] == pytest.approx(0.5e-2, rel=1e-2)
    assert distance["clip/fc2/kernel"] == pytest.approx(0.1e-2, rel=1e-2)


def test_weight_decay_leaves_vectors_alone():
    stage = make_stage(weight_decay=1.0)
    optimizer = make_optimizer(stage)
    params = {
        "llama/head/kernel": np.ones((2, 2), np.float32),
        "llama/norm/scale": np.ones(2, np.float32),
        "llama/blocks/stack/norm/scale": np.ones((3, 2), np.float32),
        "llama/blocks/stack/up/kernel": np.ones((3, 2, 2), np.float32),
    }
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = jax.jit(lambda: optimizer.update(zeros, optimizer.init(params), params))()
    assert {path for path, update in updates.items() if np.any(update != 0)} == {
        "llama/head/kernel",
        "llama/blocks/stack/up/kernel",
    }


def test_schedule_warms_up_and_ends_at_zero():
    schedule = make_schedule(make_stage(steps=100, warmup_ratio=0.1))
    assert float(schedule(0)) == pytest.approx(1e-3)
    assert float(schedule(10)) == pytest.approx(1e-2)
    assert float(schedule(100)) == pytest.approx(0)


def test_accumulation_equals_the_whole_batch():
    results = []
    for grad_accum_steps in (1, 4):
        step, state = begin(make_stage(grad_accum_steps=grad_accum_steps))
        results.append(jax.device_get(step(state, make_batch(1))))
    (whole, whole_metrics), (parts, parts_metrics) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), whole, parts)
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(value, parts_metrics[name], rtol=1e-5, err_msg=name)


def test_moving_average():
    step, state = begin(make_stage(), ema_decay=0.75)
    before = jax.device_get(state.params)
    state = jax.device_get(step(state, make_batch(1))[0])
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, state.ema)


def test_metrics():
    step, state = begin(make_stage())
    batch = make_batch(1)
    batch = batch.replace(example_id=np.array([-1, 5, -1, 1, 2, 3, 4, 6], np.int32))
    _, metrics = step(state, batch)
    assert int(metrics["skipped_rows"]) == 2
    assert int(metrics["tokens"]) == batch.text_valid.sum() - 8 + 8 * 4
    assert float(metrics["fused_share/clip"]) == pytest.approx(0.5)
    assert 0 <= float(metrics["accuracy"]) <= 1


@pytest.mark.parametrize(
    ("fusion", "plan", "shares"),
    [
        ("post", "full", {"clip", "convnext", "pix2struct"}),
        ("post", "only(encoders=convnext)", {"convnext"}),
        ("pre", "full", set()),
    ],
)
def test_shares_are_of_the_encoders_that_ran(fusion, plan, shares):
    """Of the real model: the tokens are numbered by the encoders that ran, not by all there are."""
    config = dataclasses.replace(tiny_model.CONFIG, fusion=fusion)
    model, batch = build_model(config), tiny_model.make_batch()
    stage = make_stage()
    optimizer = make_optimizer(stage)
    state = jax.eval_shape(
        lambda: make_state(
            model.init_params(batch, seed=0),
            optimizer=optimizer,
            trainable=stage.trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=False,
        )
    )
    experiment = dataclasses.replace(make_experiment(), model=config)
    steps = make_steps(
        experiment,
        {"plan": parse_plan(plan)},
        model=model,
        stage=experiment.train.stages()[0],
        optimizer=optimizer,
        state_shardings=None,
    )
    _, metrics = jax.eval_shape(steps["plan"], state, batch)
    assert {name.split("/")[1] for name in metrics if name.startswith("fused_share/")} == shares


def test_absent_images_do_not_count():
    step, state = begin(make_stage())
    batch = make_batch(1)
    batch = batch.replace(image_valid=np.arange(8)[:, None] < 3)
    _, metrics = step(state, batch)
    assert float(metrics["fused_share/pix2struct"]) == pytest.approx(0.5)


def test_ten_batches_compile_once():
    step, state = begin(make_stage(), ema_decay=0.9)
    losses = []
    for seed in range(10):
        state, metrics = step(state, make_batch(seed))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    assert len(set(losses)) == 10


def test_no_step_holds_the_logits_of_all_tokens(monkeypatch):
    rows, length, vocabulary = 256, 512, 8192
    monkeypatch.setattr(tiny_run, "VOCABULARY", vocabulary)
    monkeypatch.setattr(tiny_run, "TEXT_LENGTH", length)
    stage, batch = make_stage(batch_size=rows), make_batch(0, rows=rows)
    state = jax.eval_shape(
        lambda: make_state(
            TinyFamily().init_params(batch, seed=0),
            optimizer=make_optimizer(stage),
            trainable=stage.trainable,
            rng=jax.random.PRNGKey(0),
            use_ema=False,
        )
    )
    step = make_train_step(TinyFamily(), optimizer=make_optimizer(stage), plan=FULL, stage=stage)
    temporary = step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 0.5 * rows * length * vocabulary * 4
