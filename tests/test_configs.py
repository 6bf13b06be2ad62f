"""The config files: they build, and what they call equal budgets is equal."""

import dataclasses
import importlib

import jax
import pytest

from meteor_jax.data.pipeline import open_sources
from meteor_jax.data.templates import get_template
from meteor_jax.evaluation.request import check_request
from meteor_jax.experiment.config import load_experiment
from meteor_jax.models.eagle.cost import count_cost
from meteor_jax.models.eagle.presets import MODELS
from meteor_jax.parallel.mesh import make_mesh
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.text import parse_plan


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_every_plan_keeps_at_most_a_quarter(name, tmp_path):
    experiment = load_experiment(importlib.import_module(f"configs.{name}").get_config())
    check_request(experiment, source_dir=tmp_path)
    equal = dict.fromkeys(experiment.model.encoders, (1.0, 1.0, 1.0))
    ranks = {"energy 0.99": equal}
    whole = count_cost(experiment.model, parse_plan("full")).visual_tokens_mean
    for text in experiment.plans:
        plan = parse_plan(text, library=experiment.plans).calibrated(Calibration(ranks=ranks))
        mean = count_cost(experiment.model, plan).visual_tokens_mean
        if plan.encoders:  # an encoder dropped, nothing else
            assert mean < whole
        else:
            assert 0.18 * whole < mean < 0.245 * whole, text


def eagle(name):
    return load_experiment(importlib.import_module("configs.eagle").get_config(name))


@pytest.mark.parametrize("name", [f"{form}{name}" for name in MODELS for form in ("", "meteor_")])
def test_the_recipe_is_eagles(name, tmp_path):
    experiment = eagle(name)
    check_request(experiment, source_dir=tmp_path)
    assert make_mesh(experiment.train.mesh).shape["fsdp"] == jax.device_count()
    pretrain, finetune = (stage.config for stage in experiment.train.stages())
    assert (pretrain.batch_size, pretrain.learning_rate, pretrain.steps) == (256, 1e-3, 2179)
    assert (finetune.batch_size, finetune.learning_rate, finetune.steps) == (128, 2e-5, 14060)
    assert pretrain.trainable == ("projector",) and finetune.trainable == (".*",)
    for stage in (pretrain, finetune):
        assert (stage.warmup_ratio, stage.weight_decay, stage.adam_b2) == (0.03, 0.0, 0.999)
        plan = parse_plan(stage.plans[0], library=experiment.plans)
        assert (not plan.fusion_steps) == (not name.startswith("meteor_"))
    assert pretrain.template == "plain" and get_template(finetune.template).keeps_question
    model = experiment.model
    assert model.dtype == "bfloat16" and model.llama.remat == "nothing_saveable"
    # Text and image together find a place in the decoder.
    visual = 576 if name.startswith("meteor_") else 1024
    assert finetune.text_length - 1 + visual <= model.llama.max_positions
    assert len(experiment.init_from) == len(model.encoders) + 1


def test_data_that_is_not_prepared_is_one_line_with_the_command(tmp_path):
    data = dataclasses.replace(eagle("meteor_x4_7b").data, data_dir=str(tmp_path))
    with pytest.raises(ValueError) as error:
        open_sources(data)
    message = str(error.value)
    assert "'llava:llava_pretrain_558k' is not prepared" in message and "\n" not in message
    assert "meteor prepare --json=FILE --images=FOLDER" in message
