"""λ and ranks."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from meteor_jax.cli.calibrate import rank_table
from meteor_jax.config import ConfigError
from meteor_jax.data.tokenizers import ByteTokenizer
from meteor_jax.experiment.config import load_experiment
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.inference.budgets import Questions, calibrate_budget
from meteor_jax.inference.calibrate import (
    CalibrationBatch,
    calibrate_plans,
    calibration_batch,
)
from meteor_jax.models.eagle.config import MeteorConfig, default_encoders
from meteor_jax.pruning.budgets import Adaptive
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.text import override, parse_plan
from tests import tiny_model as tiny
from tests.evaluation.random_model import config, png


def batch():
    rows = tiny.make_batch(lengths=(12, 9, 7, 11), with_image=(True,) * 4)
    first = Questions(rows.tokens, rows.text_valid, np.ones(4, bool))
    other = tiny.make_batch(lengths=(8, 12, 12, 6), with_image=(True,) * 4, seed=1)
    second = Questions(other.tokens, other.text_valid, np.array([True, True, False, True]))
    return CalibrationBatch(rows.images[:, 0], (first, second))


@pytest.mark.long
def test_each_step_of_a_plan_keeps_its_mean():
    plan = tiny.plan(tiny.METEOR)
    asked = batch()
    measured = calibrate_budget(
        tiny.MODEL, tiny.params(), asked.images, questions=asked.questions, plan=plan
    )
    plan = plan.with_decoder_budgets(measured.budgets)
    rows = tiny.make_batch(lengths=(12, 9, 7, 11), with_image=(True,) * 4)
    visual = tiny.encode(tiny.params(), rows.images, plan=plan).tokens
    steps = tiny.prefill(tiny.params(), visual, rows, plan=plan, max_new_tokens=0).prune_steps
    for step, budget, kept in zip(steps, measured.budgets, measured.kept, strict=True):
        assert abs(float(np.mean(step.num_kept)) - budget.keep) <= 0.5
        assert [len(of_image) for of_image in kept] == [2, 2, 1, 2]  # those that were asked
        assert max(np.concatenate(kept)) <= dict(budget.edges)[1][-1] <= 21


@pytest.mark.long
def test_a_step_that_can_drop_nothing_needs_no_lambda():
    plan, asked = tiny.plan(tiny.METEOR), batch()
    fused = tiny.encode(tiny.params(), asked.images[:, None], plan=plan).tokens.num_tokens
    budgets = [Adaptive(keep, budget_range=(1.0, 1.5)) for keep in (fused, fused // 2)]
    measured = calibrate_budget(
        tiny.MODEL,
        tiny.params(),
        asked.images,
        questions=asked.questions,
        plan=override(plan, **{"decode.layers": (1, 2)}).with_decoder_budgets(budgets),
    )
    assert measured.budgets[0].lambda_ == 1.0 and measured.budgets[1].lambda_ > 0
    assert (np.concatenate(measured.kept[0]) == fused).all()
    assert np.concatenate(measured.kept[1]).min() >= fused // 2


def test_what_cannot_be_read_or_does_not_fit_is_passed_over():
    experiment = load_experiment(config("data"))

    def record(question, image):
        return {"image": image, "caption": "", "qa": [{"question": question, "answer": "yes"}]}

    broken, long = record("is it?", png(0)[:60]), record("is it? " * 40, png(1))
    records = [[broken, long, record("is it red?", png(2)), record("is it blue?", png(3))]]
    batch = calibration_batch(experiment, tokenizer=ByteTokenizer(), records=records)
    expected = calibration_batch(experiment, tokenizer=ByteTokenizer(), records=[records[0][2:]])
    assert batch.images.shape == (2, 32, 32, 3)
    jax.tree.map(np.testing.assert_array_equal, batch, expected)
    with pytest.raises(ConfigError, match=r"no question fits data\.text_length=96"):
        calibration_batch(experiment, tokenizer=ByteTokenizer(), records=[[broken, long]])


def test_an_unknown_template_is_not_taken_for_examples_that_do_not_fit():
    experiment = load_experiment(config("data"))
    finetune = dataclasses.replace(experiment.train.finetune, template="qs")
    train = dataclasses.replace(experiment.train, finetune=finetune)
    qa = [{"question": "is it red?", "answer": "yes"}]
    records = [[{"image": png(0), "caption": "", "qa": qa}]]
    with pytest.raises(ValueError, match="no such template 'qs'"):
        calibration_batch(
            dataclasses.replace(experiment, train=train, eval=EvalConfig(template="qs")),
            tokenizer=ByteTokenizer(),
            records=records,
        )


@pytest.mark.long
def test_ranks_are_measured_where_a_plan_goes_by_ranks_that_nothing_did():
    plan = parse_plan("meteor(encode=(26, 22, 30), fuse=20)")
    measured = calibrate_plans(
        tiny.MODEL, tiny.params(), plans=[plan], batch=batch(), calibration=Calibration()
    )
    assert set(measured.ranks["energy 0.99"]) == {"clip", "convnext", "pix2struct"}


@pytest.mark.long
def test_only_adaptive_plans_are_measured():
    plans = [tiny.plan(text) for text in ("full", "fastv(layer=2, keep=5)", tiny.METEOR)]
    measured = calibrate_plans(
        tiny.MODEL, tiny.params(), plans=plans, batch=batch(), calibration=tiny.RANKS
    )
    assert set(measured.plans) == {"meteor"} and measured.ranks == tiny.RANKS.ranks


def default_ranks(model, params):
    """The ranks that a plan goes by which says nothing of ranks."""
    plan = parse_plan("meteor(encode=(26, 22, 30), fuse=20)")
    calibration = calibrate_plans(
        model, params, plans=[plan], batch=batch(), calibration=Calibration()
    )
    of_steps = [dict(s.budget.ranks) for s in plan.calibrated(calibration).stage("encode")]
    return {name: tuple(ranks[name] for ranks in of_steps) for name in of_steps[0]}


class OneMap:
    """A model whose only encoder sees the same map in every image."""

    config = MeteorConfig(encoders=default_encoders("clip"))

    def __init__(self, features):
        self.features = features

    def clone(self, **_):
        return self

    def apply(self, variables, images, *, method):
        assert method == "segment_features"
        return {"clip": (jnp.broadcast_to(self.features, (len(images), *self.features.shape)),) * 3}


def test_a_map_of_forty_factors_in_bfloat16_has_rank_forty():
    random = np.random.default_rng(0)
    features = random.normal(size=(576, 40)) @ random.normal(size=(40, 1024))
    ranks = default_ranks(OneMap(jnp.asarray(features, jnp.bfloat16)), {})
    np.testing.assert_allclose(ranks["clip"], (40,) * 3, atol=1)


def test_default_ranks_of_a_bfloat16_model_tell_a_deficient_encoder_from_a_full_one():
    """Whatever writes into Pix2Struct's features writes into three dimensions of sixteen."""
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(16, 3)))[0]
    narrow = ("embedding", "patch_embedding", "attention/out", "mlp/out")

    def project(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf @ basis @ basis.T if any(part in name for part in narrow) else leaf

    params = dict(tiny.params())
    params["pix2struct"] = jax.tree_util.tree_map_with_path(project, params["pix2struct"])
    model = tiny.MODEL.clone(config=dataclasses.replace(tiny.CONFIG, dtype="bfloat16"))
    ranks = default_ranks(model, params)
    assert max(ranks["pix2struct"]) <= 3 and min(ranks["clip"]) > 6


def test_the_table_shows_what_a_rank_could_be_at_most():
    calibration = Calibration(ranks={"energy 0.99": {"clip": (3.5, 7.0, 9.25)}})
    console = Console(file=io.StringIO(), width=200)
    console.print(rank_table(calibration, shapes={"clip": (36, 96)}))
    (row,) = [line for line in console.file.getvalue().splitlines() if "clip" in line]
    assert row.replace("│", " ").split() == [
        "energy",
        "0.99",
        "clip",
        "36",
        "96",
        "3.5",
        "7.0",
        "9.2",
    ]
