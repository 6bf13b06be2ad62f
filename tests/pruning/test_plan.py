"""Plans: names, overrides, JSON, budgets, errors in one line."""

import dataclasses

import pytest

from meteor_jax.config import ConfigError
from meteor_jax.pruning.baselines import PRESETS, parse_plan, split_plans
from meteor_jax.pruning.plan import Calibration, DecodePlan, PrunePlan, override
from tests import tiny_model as tiny

LIBRARY = {"meteor": tiny.METEOR, "small": "random(keep=3)"}


@pytest.mark.parametrize(
    "text",
    [
        "full",
        tiny.METEOR,
        "random(keep=9, seed=2)",
        "uniform(keep=9)",
        "pool(keep=9)",
        "independent(keep=9)",
        "fastv(layer=1, keep=9)",
        "only(encoders=('clip', 'convnext'))",
        "pyramiddrop(layers=(1, 2), keep=(9, 5))",
    ],
)
def test_json_gives_the_same_plan_back(text, tmp_path):
    plan = parse_plan(text).calibrated(tiny.RANKS)
    assert PrunePlan.from_json(plan.to_json()) == plan
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert parse_plan(str(path)) == plan
    assert isinstance(hash(plan), int)


def test_the_library_comes_before_the_presets_and_its_fields_can_be_replaced():
    assert parse_plan("meteor", library=LIBRARY).fuse.keep == 20
    plan = parse_plan("meteor(decode.heads=0, fuse.similarity=abs_cosine)", library=LIBRARY)
    assert plan.decode.heads == 0 and plan.fuse.similarity == "abs_cosine"
    assert plan.name == "meteor(decode.heads=0,fuse.similarity=abs_cosine)"
    assert parse_plan("small", library=LIBRARY).name == "small"


def test_commas_within_parentheses_do_not_split():
    assert split_plans("full, fastv(layer=2,keep=8),pool(keep=(4))") == [
        "full",
        "fastv(layer=2,keep=8)",
        "pool(keep=(4))",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metero", "no plan 'metero'. Did you mean 'meteor'?"),
        ("fastv(layers=2, keep=4)", "no argument 'layers'. Did you mean 'layer'?"),
        ("fastv(layer=2)", "missing keep; write fastv(keep=…)"),
        ("random(keep=few)", "fuse.keep: expected int"),
        ("meteor(decode.head=2)", "Did you mean 'heads'?"),
        ("small(decode.heads=2)", "has no stage 'decode'"),
        ("random(keep=4", "expected a name, name(field=value, …)"),
        ("random(4)", "expected field=value, got '4'"),
        ("missing.json", "plan file missing.json does not exist"),
        ("pyramiddrop(layers=(1, 2), keep=(9,))", "2 layers but 1 budgets"),
    ],
)
def test_mistakes_are_one_clear_line(text, message):
    with pytest.raises(ConfigError) as error:
        parse_plan(text, library=LIBRARY)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_ranks_must_be_measured_before_they_are_used():
    shapes = {name: tiny.CONFIG.encoder(name) for name in tiny.CONFIG.encoders}
    with pytest.raises(ValueError, match=r"no feature ranks .*calibrate"):
        parse_plan(tiny.METEOR).encode.encoder_cuts(shapes)


def test_each_boundary_meets_its_budget_and_convnext_is_cut_at_its_output_only():
    shapes = {name: tiny.CONFIG.encoder(name) for name in tiny.CONFIG.encoders}
    plan = tiny.plan(tiny.METEOR).encode
    cuts = plan.encoder_cuts(shapes)
    for boundary in range(2):
        assert cuts["convnext"][boundary].keep == 16
        assert (
            sum(cuts[name][boundary].keep for name in ("clip", "pix2struct")) == plan.keep[boundary]
        )
    assert sum(cut[2].keep for cut in cuts.values()) == plan.keep[2]
    assert cuts["clip"][0].keep > cuts["pix2struct"][0].keep  # rank 4 against 2
    inverse = dataclasses.replace(plan, assignment="inverse_rank").encoder_cuts(shapes)
    assert inverse["clip"][0].keep < inverse["pix2struct"][0].keep
    assert cuts["convnext"][2].criterion == "mean_token"


def test_totals_hold_every_k_and_never_exceed_what_there_is():
    plan = DecodePlan(layers=(1,), keep=(10,), budget_range=(0.5, 2.0))
    assert plan.bounds(0) == (5, 20)
    assert plan.totals(0, rows=1, available=100) == (11, 15, 20)  # of the mean 1.05, 1.5 and all
    assert plan.totals(0, rows=8, available=100) == (84, 120, 160)
    assert plan.totals(0, rows=8, available=12) == (84, 88, 96)
    measured = dataclasses.replace(plan, edges=(((2, (9.5, 12.0)), (8, (9.8, 10.5))),))
    assert measured.totals(0, rows=2, available=100) == (19, 24, 40)
    assert measured.totals(0, rows=16, available=100) == (157, 168, 320)  # as of 8 rows
    assert measured.totals(0, rows=1, available=100) == (10, 12, 20)  # nothing smaller was measured
    assert dataclasses.replace(measured, num_totals=2).totals(0, rows=2, available=100) == (19, 40)
    fixed = dataclasses.replace(plan, budget="fixed")
    assert fixed.totals(0, rows=4, available=100) == (40,)


def test_a_cut_that_can_drop_nothing_is_none():
    plan = DecodePlan(layers=(1, 2, 3), keep=(20, 20, 8), budget_range=(0.5, 1.5))
    assert plan.cuts_that_drop(available=24) == (0, 1, 2)
    assert dataclasses.replace(plan, budget="fixed").cuts_that_drop(available=20) == (2,)
    sure = dataclasses.replace(plan, budget_range=(1.0, 1.5))
    assert sure.cuts_that_drop(available=20) == (2,)
    with pytest.raises(ValueError, match="only 19 visual tokens"):
        plan.cuts_that_drop(available=19)


def test_a_calibration_survives_its_file(tmp_path):
    path = tmp_path / "calibration.json"
    assert Calibration.load(path) == Calibration()
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="expected fields by name, got \\[1\\]"):
        Calibration.load(path)
    edges = (((1, (11.5, 20.0)), (8, (10.5,))),) * 3
    calibration = dataclasses.replace(
        tiny.RANKS, scales={"meteor": (1.5, 2.0, 3.0)}, edges={"meteor": edges}
    )
    calibration.save(path)
    assert Calibration.load(path) == calibration
    plan = parse_plan("meteor", library=LIBRARY).calibrated(calibration)
    assert plan.decode.scale == (1.5, 2.0, 3.0) and dict(plan.encode.ranks)["clip"][0] == 4.0
    assert plan.decode.edges == edges
    hash(plan)  # it is a static argument


def test_an_edited_plan_does_not_take_the_scale_of_what_it_was():
    plan = override(parse_plan("meteor", library=LIBRARY), **{"decode.scale": ()})
    measured = dataclasses.replace(plan.decode, scale=(1.5, 2.0, 3.0))
    calibration = tiny.RANKS.with_decode(plan, measured)
    assert plan.calibrated(calibration).decode.scale == (1.5, 2.0, 3.0)
    # What is measured is no edit.
    assert plan.calibrated(calibration).calibrated(calibration).decode.scale == (1.5, 2.0, 3.0)
    assert override(plan, **{"decode.heads": 1}).calibrated(calibration).decode.scale == ()
    assert override(plan, **{"fuse.keep": 17}).calibrated(calibration).decode.scale == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_totals": 0}, "num_totals: expected 1 to 3, got 0"),
        ({"budget_range": (1.2, 1.5)}, "budget_range: expected a share up to 1"),
        ({"budget_range": (0.5, 0.9)}, "a multiple from 1 on, got 0.5, 0.9"),
    ],
)
def test_bounds_that_no_k_can_have_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DecodePlan(layers=(1,), keep=(10,), **fields)


def test_one_total_holds_the_largest_k():
    plan = DecodePlan(layers=(1,), keep=(10,), budget_range=(0.5, 2.0), num_totals=1)
    assert plan.totals(0, rows=3, available=100) == (60,)


def test_every_preset_is_reachable():
    assert set(PRESETS) >= {
        "full",
        "meteor",
        "random",
        "uniform",
        "pool",
        "independent",
        "fastv",
        "pyramiddrop",
        "only",
    }
    with pytest.raises(ConfigError, match="no such field"):
        override(PrunePlan(), decoed=None)
