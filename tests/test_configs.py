"""The config files: they build, and what they call equal budgets is equal."""

import importlib

import pytest

from meteor_jax.evaluation.config import check_request
from meteor_jax.models.cost import count_cost
from meteor_jax.pruning.baselines import parse_plan
from meteor_jax.pruning.plan import Calibration
from meteor_jax.training.experiment import load_experiment


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_every_plan_keeps_at_most_a_quarter(name, tmp_path):
    experiment = load_experiment(importlib.import_module(f"configs.{name}").get_config())
    check_request(experiment, source_dir=tmp_path)
    ranks = {"tolerance": dict.fromkeys(experiment.model.encoders, (1.0, 1.0, 1.0))}
    whole = count_cost(experiment.model, parse_plan("full")).visual_tokens_mean
    for text in experiment.plans:
        plan = parse_plan(text, library=experiment.plans).calibrated(Calibration(ranks=ranks))
        mean = count_cost(experiment.model, plan).visual_tokens_mean
        if plan.encoders:  # an encoder dropped, nothing else
            assert mean < whole
        else:
            assert 0.18 * whole < mean < 0.245 * whole, text
