"""λ and ranks."""

import dataclasses

import jax
import numpy as np
import pytest

from meteor_jax.tools.calibrate import (
    CalibrationBatch,
    calibrate_plans,
    calibrate_ranks,
    calibrate_scales,
    fit_scale,
)
from tests import tiny_model as tiny


def batch():
    rows = tiny.make_batch(lengths=(12, 9, 7, 11), with_image=(True,) * 4)
    return CalibrationBatch(rows.images[:, 0], rows.tokens, rows.text_valid)


def test_the_mean_of_k_meets_the_target():
    masses = np.random.default_rng(0).uniform(0.2, 1.0, 500)
    many = np.full(500, 100)
    scale = fit_scale(masses, low_high=(10, 60), target=30, available=many)
    kept = np.clip(np.round(scale * masses), 10, 60)
    assert abs(kept.mean() - 30) < 0.1 and kept.std() > 3
    with pytest.raises(ValueError, match="no text attention"):
        fit_scale(np.zeros(4), low_high=(1, 2), target=1, available=np.full(4, 9))


def test_the_mean_of_k_meets_the_target_where_fewer_tokens_reach_the_cut():
    masses = np.random.default_rng(0).uniform(0.2, 1.0, 500)
    few = np.full(500, 35)
    scale = fit_scale(masses, low_high=(10, 60), target=30, available=few)
    kept = np.clip(np.round(scale * masses), 10, 60)
    assert abs(np.minimum(kept, few).mean() - 30) < 0.1
    assert kept.mean() > 32  # what would have been enough without the limit keeps too few


@pytest.mark.long
def test_each_cut_of_a_plan_keeps_its_mean():
    plan = tiny.plan(tiny.METEOR)
    scale = calibrate_scales(tiny.MODEL, tiny.params(), plan=plan, batches=[batch()])
    plan = dataclasses.replace(plan, decode=dataclasses.replace(plan.decode, scale=scale))
    rows = tiny.make_batch(lengths=(12, 9, 7, 11), with_image=(True,) * 4)
    visual = tiny.encode(tiny.params(), rows.images, plan=plan).tokens
    cuts = tiny.prefill(tiny.params(), visual, rows, plan=plan, max_new_tokens=0).cuts
    for cut, target in zip(cuts, plan.decode.keep, strict=True):
        assert abs(float(np.mean(cut.num_kept)) - target) <= 0.5


@pytest.mark.long
def test_only_adaptive_plans_are_measured():
    plans = [tiny.plan(text) for text in ("full", "fastv(layer=2, keep=5)", tiny.METEOR)]
    measured = calibrate_plans(
        tiny.MODEL, tiny.params(), plans=plans, batch=batch(), calibration=tiny.RANKS
    )
    assert set(measured.scales) == {"meteor"} and measured.ranks == tiny.RANKS.ranks


def test_ranks_are_those_of_the_features():
    images = batch().images
    ranks = calibrate_ranks(tiny.MODEL, tiny.params(), images)
    assert set(ranks) == {"tolerance", "energy"}
    features = tiny.MODEL.apply(
        {"params": tiny.params()}, images, method="boundary_features"
    )
    for name, boundaries in jax.device_get(features).items():
        for boundary, x in enumerate(boundaries):
            assert x.shape == (4, 16, 16)
            expected = np.mean([np.linalg.matrix_rank(row) for row in x])
            assert abs(ranks["tolerance"][name][boundary] - expected) <= 0.5
            assert 1 <= ranks["energy"][name][boundary] <= ranks["tolerance"][name][boundary]
