"""Plans: names, overrides, JSON, budgets, errors in one line."""

import dataclasses

import pytest

from meteor_jax.config import ConfigError
from meteor_jax.pruning.budgets import Adaptive, Fixed, steps_that_drop
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.methods.mean_token import MeanToken
from meteor_jax.pruning.methods.text_attention import TextAttention
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.registry import presets
from meteor_jax.pruning.text import override, parse_plan, split_plans
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
    assert parse_plan("meteor", library=LIBRARY).fusion_steps[0].budget.keep == 20
    plan = parse_plan("meteor(decode.heads=0, fuse.similarity=abs_cosine)", library=LIBRARY)
    assert [step.method.heads for step in plan.decoder_steps] == [0, 0]
    assert plan.fusion_steps[0].method.similarity == "abs_cosine"
    assert plan.name == "meteor(decode.heads=0,fuse.similarity=abs_cosine)"
    assert parse_plan("small", library=LIBRARY).name == "small"
    # A config file may hold plans themselves, and a command line JSON.
    objects = {"meteor": parse_plan(tiny.METEOR)}
    text = "meteor(decode.heads=0)"
    assert parse_plan(text, library=objects) == parse_plan(text, library=LIBRARY)
    assert parse_plan(objects["meteor"].to_json()) == objects["meteor"]


def test_a_tuple_with_a_value_a_step_is_spread_over_the_steps():
    plan = parse_plan("meteor(decode.keep=(12, 5), decode.heads=(1, 2))", library=LIBRARY)
    assert [step.budget.keep for step in plan.decoder_steps] == [12, 5]
    assert [step.method.heads for step in plan.decoder_steps] == [1, 2]
    # A value that is a tuple itself goes to every step.
    plan = parse_plan("meteor(decode.budget_range=(0.25, 2.0))", library=LIBRARY)
    assert {step.budget.budget_range for step in plan.decoder_steps} == {(0.25, 2.0)}


def test_stages_change_their_layers_methods_and_budgets():
    text = "meteor(decode.layers=(1, 2, 3), decode.keep=(9, 5, 4), decode.budget=fixed)"
    plan = parse_plan(text, library=LIBRARY)
    assert plan.decoder_layers == (1, 2, 3) and not plan.is_adaptive
    assert [step.budget for step in plan.decoder_steps] == [Fixed(9), Fixed(5), Fixed(4)]
    assert plan.decoder_steps[2].method.heads == 2  # as the last that there was
    text = "meteor(encode.method=(random, mean_token, attention_received(queries=cls)))"
    methods = [step.method for step in parse_plan(text, library=LIBRARY).stage("encode")]
    assert [method.name for method in methods] == ["random", "mean_token", "attention_received"]
    assert methods[2].queries == "cls"
    without = parse_plan("meteor(decode=None, fuse.keep=9)", library=LIBRARY)
    assert without.decoder_steps == () and without.fusion_steps[0].budget.keep == 9


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
        ("random(keep=few)", "keep: expected int, got 'few'"),
        ("meteor(decode.head=2)", "no such field. Did you mean 'heads'?"),
        ("small(decode.heads=2)", "has no stage 'decode'"),
        ("meteor(layers=(1, 2))", "of the config takes fields, such as fuse.keep=8, and no layers"),
        ("random(keep=4", "expected a name, name(field=value, …)"),
        ("random(4)", "expected field=value, got '4'"),
        ("missing.json", "plan file missing.json does not exist"),
        ("{", "not valid JSON"),
        ("pyramiddrop(layers=(1, 2), keep=(9,))", "2 layers but 1 budgets"),
        ("pyramiddrop(layers=(2, 1), keep=(9, 4))", "decode.layers must increase, got (2, 1)"),
        ("meteor(decode.heads=(1, 2, 3))", "heads: expected int, got (1, 2, 3)"),
        ("meteor(decode.method=textattention)", "no pruning method 'textattention'. Did you mean"),
        ("meteor(fuse.method=text_attention)", "cannot act at fusion"),
        ("meteor(fuse.budget=adaptive)", "an adaptive budget is for layers of the decoder"),
        ("meteor(decode.budget=fix)", "no budget 'fix'. Did you mean 'fixed'?"),
        ("meteor(fuse.keep=0)", "expected to keep a token"),
        ("meteor(decode.lambda_=1 + 2 * x)", "cannot read '1 + 2 * x'"),
        ("divprune(keep=4, keep=5)", "'keep' is given twice"),
        ("meteor(decode.budget=adaptive(keep=4, keep=5))", "'keep' is given twice"),
        ("divprune(keep=4, fuse.cut_caches=True)", "cut_caches is for steps before layers"),
        ("divprune(keep=4, fuse.positions=contiguous)", "positions is for steps before layers"),
        (
            '{"steps": [{"at": "fusion", "method": {"name": ["a"]}}]}',
            "steps[0].method: expected a name",
        ),
    ],
)
def test_mistakes_are_one_clear_line(text, message):
    with pytest.raises(ConfigError) as error:
        parse_plan(text, library=LIBRARY)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_ranks_must_be_measured_before_they_are_used():
    shapes = {name: tiny.CONFIG.encoder(name) for name in tiny.CONFIG.encoders}
    with pytest.raises(ValueError, match=r"no feature ranks .*calibrate"):
        parse_plan(tiny.METEOR).encoder_steps(shapes)


def test_lambda_must_be_measured_before_it_is_used():
    plan = parse_plan("meteor(fuse=20, layers=(1,), keep=(9,))")
    with pytest.raises(ConfigError, match=r"needs λ .* run `meteor calibrate --plans=\"meteor\"`"):
        plan.check_measured()
    plan.with_placeholder_lambda().check_measured()


def test_totals_hold_every_k_and_never_exceed_what_there_is():
    budget = Adaptive(10, budget_range=(0.5, 2.0))
    assert budget.bounds == (5, 20)
    assert budget.totals(rows=1, available=100) == (11, 15, 20)  # of the mean 1.05, 1.5 and all
    assert budget.totals(rows=8, available=100) == (84, 120, 160)
    assert budget.totals(rows=8, available=12) == (84, 88, 96)
    measured = dataclasses.replace(budget, edges=((2, (9.5, 12.0)), (8, (9.8, 10.5))))
    assert measured.totals(rows=2, available=100) == (19, 24, 40)
    assert measured.totals(rows=16, available=100) == (157, 168, 320)  # as of 8 rows
    assert measured.totals(rows=1, available=100) == (10, 12, 20)  # nothing smaller was measured
    assert dataclasses.replace(measured, num_totals=2).totals(rows=2, available=100) == (19, 40)
    assert dataclasses.replace(budget, num_totals=1).totals(rows=3, available=100) == (60,)
    assert Fixed(10).totals(rows=4, available=100) == (40,)


def test_a_step_that_can_drop_nothing_is_none():
    keeps = (20, 20, 8)
    assert steps_that_drop([Adaptive(k) for k in keeps], available=24) == (0, 1, 2)
    assert steps_that_drop([Fixed(k) for k in keeps], available=20) == (2,)
    sure = [Adaptive(k, budget_range=(1.0, 1.5)) for k in keeps]
    assert steps_that_drop(sure, available=20) == (2,)
    with pytest.raises(ValueError, match="only 19 visual tokens"):
        steps_that_drop([Fixed(k) for k in keeps], available=19)


def test_a_calibration_survives_its_file(tmp_path):
    path = tmp_path / "calibration.json"
    assert Calibration.load(path) == Calibration()
    for text, message in (
        ("[1]", "expected fields by name, got \\[1\\]"),
        ("{", "not valid JSON"),
        (
            '{"ranks": {"effective": {"clip": [1]}}}',
            "clip .effective.: expected 3, one",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Calibration.load(path)
    plan = parse_plan("meteor(decode.lambda_=(None, None), name=meteor)", library=LIBRARY)
    edges = ((1, (11.5, 20.0)), (8, (10.5,)))
    budgets = [Adaptive(keep, lambda_=value, edges=edges) for keep, value in ((14, 1.5), (6, 2.0))]
    calibration = tiny.RANKS.with_plan(plan.with_decoder_budgets(budgets))
    calibration.save(path)
    assert Calibration.load(path) == calibration
    plan = plan.calibrated(calibration)
    assert [step.budget.lambda_ for step in plan.decoder_steps] == [1.5, 2.0]
    assert dict(plan.steps[0].budget.ranks)["clip"] == 4.0
    assert plan.decoder_steps[0].budget.edges == edges
    hash(plan)  # it is a static argument


def test_an_edited_plan_does_not_take_the_lambda_of_what_it_was():
    plan = parse_plan("meteor(decode.lambda_=(None, None))", library=LIBRARY)
    plan = dataclasses.replace(plan, name="meteor")
    budgets = [
        dataclasses.replace(s.budget, lambda_=2.0 + i) for i, s in enumerate(plan.decoder_steps)
    ]
    calibration = tiny.RANKS.with_plan(plan.with_decoder_budgets(budgets))

    def lambdas(plan):
        return [step.budget.lambda_ for step in plan.decoder_steps]

    assert lambdas(plan.calibrated(calibration)) == [2.0, 3.0]
    # What is measured is no edit.
    assert lambdas(plan.calibrated(calibration).calibrated(calibration)) == [2.0, 3.0]
    for edit in ({"decode.heads": 1}, {"fuse.keep": 17}):
        assert lambdas(override(plan, **edit).calibrated(calibration)) == [None, None]


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
        Adaptive(10, **fields)


@pytest.mark.parametrize(
    ("at", "method", "message"),
    [
        ("nowhere at all", MeanToken(), "expected a reduction point such as encoders.segment1"),
        ("decoder.layer2", MeanToken(), "'mean_token' cannot act at decoder.layer2"),
        ("fusion", TextAttention(), "'text_attention' cannot act at fusion"),
    ],
)
def test_a_step_is_where_its_method_can_act(at, method, message):
    with pytest.raises(ValueError, match=message):
        Step(at, method, Fixed(3))


def test_every_preset_is_reachable():
    assert set(presets()) >= {
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
