"""The bench runs and counts right; how fast anything is, is not a test's business."""

import dataclasses
import importlib
import itertools
import json

import jax
import pytest
from rich.console import Console

from meteor_jax.config import ConfigError
from meteor_jax.data import pipeline
from meteor_jax.data.config import DataConfig
from meteor_jax.experiment.config import Experiment, StageConfig, TrainConfig, load_experiment
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.inference.layout import inference_mesh, param_shapes
from meteor_jax.models.eagle.cost import count_cost
from meteor_jax.perf.bench import measure as bench
from meteor_jax.perf.bench import programs as bench_programs
from meteor_jax.perf.bench import table as bench_report
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.text import parse_plan
from meteor_jax.testing import DummyTokenizer
from tests import tiny_model

METEOR = (
    "meteor(encode=(28, 26, 22), fuse=20, layers=(2,), keep=(10,), decode.heads=2, "
    "decode.num_totals=2, decode.budget_range=(0.5, 1.0))"
)
FIELDS = {
    "plan",
    "batch",
    "encode_s",
    "prefill_s",
    "decode_ms_per_token",
    "end_to_end_s",
    "peak_bytes",
    "tokens",
    "tflops",
    "versions",
    "spread",
    "compile_s",
    "process_peak_bytes",
}


@pytest.fixture(scope="module")
def experiment():
    """The tiny model as EAGLE joins encoders, and METEOR's plan for it."""
    return Experiment(
        model=dataclasses.replace(
            tiny_model.CONFIG.with_encoders("clip", "pix2struct"), fusion="pre"
        ),
        data=DataConfig(sources=("easy-vqa",)),
        # Little learns, so that there is little to compile.
        train=TrainConfig(finetune=StageConfig(steps=1, trainable=("llama/norm",))),
        plans={"meteor": METEOR},
    )


def plans_of(experiment, *names):
    return resolve_plans(names, library=experiment.plans, calibration=tiny_model.RANKS)


@pytest.fixture(scope="module")
def rows(experiment):
    return bench.bench(
        experiment,
        plans=plans_of(experiment, "full", "meteor"),
        batch_sizes=(2,),
        repeats=1,
        new_tokens=3,
        text_tokens=6,
        train=True,
        devices=jax.devices()[:1],
    )


@pytest.mark.long
def test_a_row_has_all_fields_and_is_json(rows):
    assert [(row["plan"], row["batch"]) for row in rows] == [("full", 2), ("meteor", 2)]
    for row in rows:
        assert json.loads(json.dumps(row)).keys() >= FIELDS
        parts = ("encode_s", "prefill_s", "decode_s")
        assert row["end_to_end_s"] == pytest.approx(sum(row[part] for part in parts))
        assert row["decode_ms_per_token"] == pytest.approx(1e3 * row["decode_s"] / 2)
        assert row["spread"]["encode_s"] == [row["encode_s"]] * 2  # of one run
        assert row["train_step_s"] > 0 and row["train_tflops"] > row["tflops"]
        assert row["peak_bytes"] > 4 * 1e4


@pytest.mark.long
def test_tokens_are_counted_as_measured(experiment, rows):
    full, meteor = rows
    assert full["tokens"] == 16  # one grid of 4 × 4 for all encoders
    # λ is set on these rows, so that on average a cut keeps what the plan says.
    assert meteor["tokens"] == pytest.approx((20 + 10) / 2, abs=0.5)
    whole = count_cost(experiment.model, parse_plan("full"), text_tokens=7)  # and its mark
    assert full["tflops"] == pytest.approx(whole.total_flops / 1e12)


def test_plans_take_turns():
    calls = []

    def run(name):
        calls.append(name)
        return {"encode": float(len(calls))}

    runs = {name: lambda name=name: run(name) for name in ("full", "meteor")}
    seconds = bench.interleave(runs, repeats=3)
    assert calls == ["full", "meteor"] * 3
    assert [run["encode"] for run in seconds["meteor"]] == [2.0, 4.0, 6.0]


def test_the_forms_share_every_weight_and_lie_as_evaluation_holds_them(experiment):
    models = [
        bench_programs.form_of(experiment.model, plan)
        for plan in plans_of(experiment, "full", "meteor")
    ]
    assert [model.fusion for model in models] == ["pre", "post"]
    experiment = dataclasses.replace(experiment, eval=EvalConfig(mesh="data=4,tensor=2"))
    mesh = inference_mesh(experiment, devices=jax.devices()[:8])
    params = bench_programs.make_params(models, dtype="bfloat16", mesh=mesh)
    loaded = param_shapes(experiment, mesh=mesh, dtype="bfloat16")
    own = [{name for name in params[form] if "projector" in name} for form in ("pre", "post")]
    assert own == [{"projector"}, {f"projector_{name}" for name in experiment.model.encoders}]
    for name in (*experiment.model.encoders, "llama"):
        pairs = zip(
            jax.tree.leaves(params["pre"][name]),
            jax.tree.leaves(params["post"][name]),
            strict=True,
        )
        assert all(one is other for one, other in pairs)
        assert jax.tree.map(
            lambda leaf, like: (
                leaf.dtype == like.dtype
                and leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
            ),
            params["pre"][name],
            loaded[name],
        ) == jax.tree.map(lambda _: True, loaded[name])


@pytest.mark.long
def test_the_data_are_those_of_the_stage(experiment, monkeypatch):
    asked = {}

    def iterate(**options):
        asked.update(options)
        return itertools.repeat(None)

    monkeypatch.setattr(pipeline, "open_sources", lambda config: [])
    monkeypatch.setattr(pipeline, "make_train_iterator", iterate)
    monkeypatch.setattr(bench, "load_tokenizer", lambda *_, **__: DummyTokenizer())
    stage = dataclasses.replace(experiment.train.finetune, text_length=77)
    train = dataclasses.replace(experiment.train, finetune=stage)
    experiment = dataclasses.replace(experiment, train=train)
    assert bench.bench_data(experiment, batch=3, batches=2) > 0
    assert (asked["config"].text_length, asked["batch_size"]) == (77, 3)


def test_table_and_plot(rows, tmp_path):
    console = Console(width=200, record=True)
    bench_report.print_table(rows, console=console)
    text = console.export_text()
    assert "meteor" in text and "train step" in text and "MFU" not in text
    bench_report.draw(tmp_path / "bench.png", rows)
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_what_the_user_got_wrong_is_one_line(experiment):
    with pytest.raises(ConfigError, match=r"no plan 'meteo'. Did you mean 'meteor'\?"):
        plans_of(experiment, "full", "meteo")


def load_config(divisor):
    module = importlib.import_module("configs.bench_x4_eighth")
    return load_experiment(module.get_config(divisor))


def test_the_eighth_has_all_tokens_of_x4():
    whole, eighth = load_config("1"), load_config("8")
    for name in whole.model.encoders:
        one, other = whole.model.encoder(name), eighth.model.encoder(name)
        assert one.num_tokens == other.num_tokens and one.width == 8 * other.width
        assert getattr(one, "depth", None) == getattr(other, "depth", None)
    assert eighth.model.llama.depth == 32 and eighth.model.llama.width == 512
    assert whole.model.llama.head_dim == eighth.model.llama.head_dim == 128
    full, meteor = resolve_plans(
        ("full", "meteor"), library=eighth.plans, calibration=Calibration()
    )
    assert count_cost(eighth.model, full).visual_tokens_mean == 1024
    assert meteor.stage("encode")[-1].budget.keep == 1193
    cost = count_cost(bench_programs.form_of(eighth.model, meteor), meteor)
    assert cost.visual_tokens_fused == 576 and cost.visual_tokens_mean == 242
    steps = []
    for one in (whole, eighth):
        (plan,) = resolve_plans(("meteor",), library=one.plans, calibration=Calibration())
        encoders = {name: one.model.encoder(name) for name in one.model.encoders}
        steps.append(plan.encoder_steps(encoders))
    assert steps[0] == steps[1]
    assert sum(of_encoder[-1].keep for of_encoder in steps[1].values()) == 1193


def test_other_divisors_are_an_error():
    with pytest.raises(ConfigError, match="expected a divisor of 1, 2, 4 or 8, got '3'"):
        load_config("3")
