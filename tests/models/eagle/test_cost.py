"""Operations of whole models by part, against figures that were worked out by hand."""

import importlib

import jax
import pytest

from meteor_jax.experiment.config import load_experiment
from meteor_jax.models.eagle.cost import _count_prefill, count_cost
from meteor_jax.models.eagle.model import Meteor
from meteor_jax.models.flops import counted_forms, trace_flops
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.text import parse_plan
from tests import tiny_model as tiny

# By closed formulas: 2 operations a multiply-add of every projection, MLP and convolution, all
# pairs of attention. 40 places of text; "full" over 1,024 visual tokens, METEOR over 242.
GFLOPS = {
    "x5_7b": {
        "clip": 381.200891904,
        "convnext": 6334.885920768,
        "sam": 3239.214538752,
        "eva02": 3098.41625088,
        "pix2struct": 2479.1878656,
        "projector": 98.784247808,
        "llm": 14374.483787776,
        "resizing": 11.496947712,
        "scores": 0.0,
    },
    "meteor_x5_7b": {
        "clip": 380.961849344,
        "convnext": 6334.885920768,
        "sam": 2655.264346112,
        "eva02": 1548.863668224,
        "pix2struct": 1612.836753408,
        "projector": 55.02926848,
        "llm": 3717.084479488,
        "resizing": 10.665590784,
        "scores": 133.966919904,
    },
}


def load(name):
    experiment = load_experiment(importlib.import_module("configs.eagle").get_config(name))
    equal = dict.fromkeys(experiment.model.encoders, (1.0, 1.0, 1.0))
    text = "meteor" if name.startswith("meteor_") else "full"
    plan = parse_plan(text, library=experiment.plans)
    return experiment.model, plan.calibrated(Calibration(ranks={"energy 0.99": equal}))


@pytest.mark.parametrize("name", GFLOPS)
def test_parts_of_eagle_at_full_size(name):
    config, plan = load(name)
    cost = count_cost(config, plan, text_tokens=40)
    assert {part: flops / 1e9 for part, flops in cost.rows} == pytest.approx(GFLOPS[name])
    assert cost.visual_tokens_mean == (242 if name.startswith("meteor_") else 1024)


def test_the_papers_table():
    """TFLOPs as METEOR's table has them: the patch embedding left out of CLIP and EVA-02."""
    config, plan = load("x4_7b")
    cost = count_cost(config, plan)
    assert round(cost.total_flops / 1e12, 1) == 26.2
    parts = dict(cost.rows)

    def blocks(name):
        encoder = config.encoder(name)
        patch = 2 * encoder.num_tokens * encoder.patch_size**2 * 3 * encoder.width
        return round((parts[name] - patch) / 1e12, 3)

    assert (blocks("clip"), blocks("eva02")) == (0.381, 3.092)


@pytest.mark.parametrize(
    "text",
    [
        tiny.METEOR.split(", decode.lambda_")[0] + ", decode.budget=fixed)",
        "sparsevlm(layers=(1, 2, 3), keep=(24, 12, 6))",
        "pool(keep=20)",
    ],
)
def test_two_images_and_their_text_cost_what_one_program_of_both_does(text):
    """Every operation of it has its row, the head excepted."""
    plan = tiny.plan(text)
    batch = tiny.row(tiny.make_batch(), 0)
    batch = batch.replace(
        images=batch.images.repeat(2, axis=1), image_valid=batch.image_valid.repeat(2, axis=1)
    )

    def program(params, batch):
        return Meteor(tiny.CONFIG).apply({"params": params}, batch, plan=plan)

    params = jax.eval_shape(tiny.params)
    with counted_forms():
        whole, _ = trace_flops(program, params, batch)
    head = 2 * tiny.TEXT_LENGTH * tiny.CONFIG.llama.width * tiny.VOCAB
    cost = count_cost(tiny.CONFIG, plan, text_tokens=tiny.TEXT_LENGTH, num_images=2)
    assert cost.total_flops == whole.total - head


def test_of_an_adaptive_budget_the_totals_that_ran_count():
    plan = tiny.plan(tiny.METEOR)

    def llm(*computed, rows=8):
        cost = count_cost(tiny.CONFIG, plan, text_tokens=12, computed=computed, rows=rows)
        return dict(cost.rows)["llm"]

    low, high = (plan.decoder_steps[1].budget.totals(rows=8, available=21)[i] / 8 for i in (0, -1))
    middle = (low + high) / 2
    assert llm(15, low) < llm(15, middle) < llm(15, high)
    assert llm(15, middle) == pytest.approx((llm(15, low) + llm(15, high)) / 2)
    _count_prefill.cache_clear()
    with jax.set_mesh(make_mesh(MeshConfig(2, 4))):  # its rows are those of one shard
        cost = count_cost(tiny.CONFIG, plan, text_tokens=12, computed=(15, low), rows=8)
    assert dict(cost.rows)["llm"] == llm(15, low)
    assert cost.visual_tokens_mean == (20 + 2 * 15 + low) / 4


def test_layers_that_see_no_visual_tokens_cost_less_and_caches_do_not_matter():
    whole, late = (count_cost(tiny.CONFIG, parse_plan(t)) for t in ("full", "full(enter_at=2)"))
    depth = tiny.CONFIG.llama.depth
    assert late.total_flops < whole.total_flops
    assert late.visual_tokens_mean == whole.visual_tokens_mean * (depth - 2) / depth
    same, cut = (
        count_cost(tiny.CONFIG, parse_plan(f"fastv(layer=2, keep=5{more})"))
        for more in ("", ", decode.cut_caches=True")
    )
    assert cut == same
