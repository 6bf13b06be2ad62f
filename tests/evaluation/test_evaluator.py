"""The real model, as small as it gets, over a few generated images."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import pytest

from meteor_jax.config import ConfigError
from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.evaluation.request import check_request
from meteor_jax.evaluation.tasks import registry
from meteor_jax.evaluation.tasks.registry import open_task_source
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference.engine.batching import BatchSizes
from meteor_jax.inference.engine.predictor import encode_images
from meteor_jax.inference.generate import start
from meteor_jax.inference.layout import param_shapes
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.random_model import config, make_params, png

REPOSITORY = Path(__file__).parents[2]


def records(num_images):
    """Noise, and the same five questions of each image; the last image is cut off."""
    questions = [("easyvqa_yesno", f"is it {word}?", "yes") for word in ("red", "green", "blue")]
    questions += [("easyvqa_attribute", f"what is the {word}?", "red") for word in ("color", "x")]
    return [
        {
            "image": png(i)[: 200 if i == num_images - 1 else None],
            "image_id": i,
            "qa": [
                {"task": task, "question": question, "answer": answer, "question_id": 10 * i + j}
                for j, (task, question, answer) in enumerate(questions)
            ],
        }
        for i in range(num_images)
    ]


@pytest.fixture(scope="module", autouse=True)
def data_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            registry, "open_task_source", lambda task, **kwargs: records(kwargs["num_images"])
        )
        yield tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def experiment(data_dir):
    return load_experiment(config(data_dir))


@pytest.fixture(scope="module")
def params(experiment):
    return make_params(experiment)


@pytest.fixture(scope="module")
def done(experiment, params, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    before = encode_images._cache_size(), start._cache_size()
    rows = evaluate_checkpoint(
        experiment, params, workdir=workdir, plans=("full", "cut"), display="quiet"
    )
    compiled = encode_images._cache_size() - before[0], start._cache_size() - before[1]
    return workdir, rows, compiled


def predictions(workdir, plan):
    """The lines without what depends on the clock and on how many are asked together."""
    content = json.loads((workdir / "eval.json").read_text())
    lines = (workdir / content["predictions"][plan]).read_text().splitlines()
    return [json.loads(line) | {"seconds": None, "rows": None} for line in lines]


def test_one_compilation_a_plan(done):
    _, _, (encoders, decoders) = done
    assert encoders == 2
    assert decoders == 3  # and one without an image


def test_every_plan_answers_every_question_once(done):
    workdir, rows, _ = done
    asked = [line["question_id"] for line in predictions(workdir, "full")]
    assert len(asked) == len(set(asked)) == 35
    for plan in ("cut", "blind", "majority"):
        assert [line["question_id"] for line in predictions(workdir, plan)] == asked
    assert {row.plan for row in rows} == {"full", "cut", "blind", "majority"}
    assert {row.task for row in rows} == {
        "easyvqa_attribute",
        "easyvqa_yesno",
        "easyvqa_all",
    }


def test_tokens_and_cost_are_those_of_the_plan(done):
    _, rows, _ = done
    by_plan = {row.plan: row for row in rows if row.task == "easyvqa_all"}
    full, cut = by_plan["full"], by_plan["cut"]
    assert full.visual_tokens_kept == full.visual_tokens_computed == full.visual_tokens_fused == 25
    assert cut.visual_tokens_kept == cut.visual_tokens_computed == (25 + 6) / 2  # one of two layers
    assert by_plan["full"].tflops > by_plan["cut"].tflops > 0
    assert by_plan["blind"].visual_tokens_computed == 0
    assert all(line["kept"] == [6] for line in sound(predictions(done[0], "cut")))


def sound(lines):
    return [line for line in lines if not line["corrupt"]]


def test_a_corrupt_image_is_scored_wrong(done):
    workdir, rows, _ = done
    for plan in ("full", "cut", "blind"):
        broken = [line for line in predictions(workdir, plan) if line["corrupt"]]
        assert [line["image_id"] for line in broken] == [6] * 5
        assert all(line["score"] == 0 for line in broken)
    row = next(row for row in rows if (row.task, row.plan) == ("easyvqa_yesno", "full"))
    assert (row.n, row.corrupt) == (21, 3)


def test_files_are_written(done, experiment):
    workdir, rows, _ = done
    content = json.loads((workdir / "eval.json").read_text())
    assert len(content["rows"]) == len(rows)
    assert set(content["plans"]) == {"full", "cut"}
    assert content["config"]["model"] == json.loads(json.dumps(asdict(experiment.model)))
    assert {"meteor_jax", "jax", "flax"} <= content["versions"].keys()
    assert content["seeds"] == {"questions": 0, "source": 0}
    times = content["seconds"]["cut"]
    assert times["asked"] == 35
    assert times["wall"] == pytest.approx(times["model"] + times["host"])
    spread = content["kept_tokens"]["cut"]["easyvqa_yesno"]
    assert (
        spread["prune_steps"][0]["mean"] == 6 and spread["mean_over_layers"]["mean"] == (25 + 6) / 2
    )
    assert spread["prune_steps"][0]["histogram"]["counts"] == [18]
    assert (workdir / "kept_tokens.png").stat().st_size > 5000
    examples = json.loads((workdir / "examples" / "examples.json").read_text())
    assert [example["plan"] for example in examples] == ["cut", "cut"]
    assert len({example["image_id"] for example in examples}) == 2
    for example in examples:
        assert sum(example["kept"]["LLM step 1"].values()) == 6
        assert (workdir / "examples" / example["picture"]).stat().st_size > 5000


def test_batch_sizes_do_not_change_predictions(done, data_dir, params, tmp_path):
    sizes = {"encode_batch_size": 1, "batch_size": 1, "visual_cache_images": 3}
    values = config(data_dir)
    values["eval"] = values["eval"] | sizes | {"num_visualizations": 0}
    evaluate_checkpoint(
        load_experiment(values), params, workdir=tmp_path, plans=("cut",), display="quiet"
    )
    for plan in ("cut", "blind"):
        assert predictions(tmp_path, plan) == predictions(done[0], plan)


@pytest.mark.parametrize(("shards", "encode", "batch"), [(1, 2, 16), (5, 5, 20), (64, 64, 64)])
def test_batches_are_rounded_up_to_the_shards(data_dir, shards, encode, batch):
    sizes = BatchSizes.of(load_experiment(config(data_dir)).eval, shards=shards)
    assert (sizes.encode, sizes.batch, sizes.cache) == (encode, batch, 4)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("fastv(layer=2, keep=4)", r"within 1\.\.1"),
        ("meteor(fuse=9, layers=(1,), keep=(10,), decode.budget=fixed)", "only 9"),
    ],
)
def test_a_plan_that_does_not_fit_ends_it_before_any_is_run(
    experiment, params, tmp_path, plan, message
):
    with pytest.raises(ValueError, match=message):
        evaluate_checkpoint(
            experiment,
            params,
            workdir=tmp_path,
            display="quiet",
            plans=("full", plan),
        )
    assert not list(tmp_path.rglob("*.jsonl*"))


def test_a_second_evaluation_asks_nothing(done, experiment, params):
    workdir, rows, _ = done
    before = predictions(workdir, "cut"), start._cache_size()
    again = evaluate_checkpoint(
        experiment, params, workdir=workdir, plans=("full", "cut"), display="quiet"
    )
    assert again == rows
    assert (predictions(workdir, "cut"), start._cache_size()) == before


def test_answers_and_scores_of_another_checkpoint_stay(data_dir, params, tmp_path):
    """Whether it has another step, or the same one."""
    values = config(data_dir)
    experiment = load_experiment(values | {"eval": values["eval"] | {"num_visualizations": 0}})

    def evaluate(params, step):
        evaluate_checkpoint(
            experiment, params, workdir=tmp_path, plans=("cut",), step=step, display="quiet"
        )
        content = json.loads((tmp_path / "eval.json").read_text())
        lines = [
            line
            for path in tmp_path.rglob("*.jsonl")
            if "majority" not in path.name
            for line in path.read_text().splitlines()
        ]
        scores = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
        return content, lines, scores

    others = jax.tree.map(lambda leaf: leaf * 1.5, params)
    seen_lines, seen_scores = [], []
    for each, step in ((params, 1), (others, 2), (params, 2)):
        content, lines, scores = evaluate(each, step)
        assert all(line in lines for line in seen_lines)
        assert all(score in scores for score in seen_scores)
        assert content["step"] == step and content in scores
        seen_lines, seen_scores = lines, [*seen_scores, content]
    assert len(seen_lines) == 3 * 2 * 35  # of three checkpoints, the plan and "blind"

    again, lines, _ = evaluate(params, 1)
    assert sorted(lines) == sorted(seen_lines)
    assert again["seconds"] == seen_scores[0]["seconds"] and again["rows"] == seen_scores[0]["rows"]


@pytest.mark.slow
def test_batch_1_and_16_agree_on_500_questions_of_easy_vqa(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "open_task_source", open_task_source)
    said = []
    for size in (1, 16):
        values = config(data_dir)
        sizes = {"encode_batch_size": size, "batch_size": size, "num_images": 200}
        values["eval"] = values["eval"] | sizes | {"num_questions": 250, "num_visualizations": 0}
        experiment = load_experiment(values)
        evaluate_checkpoint(
            experiment,
            make_params(experiment),
            workdir=tmp_path / str(size),
            plans=("full", "cut"),
            display="quiet",
        )
        said.append([predictions(tmp_path / str(size), plan) for plan in ("full", "cut", "blind")])
    assert said[0] == said[1]
    assert [len(lines) for lines in said[0]] == [500] * 3


def test_a_blind_model_says_the_same_of_any_image(done):
    said = {}
    for line in sound(predictions(done[0], "blind")):
        said.setdefault(line["question"], set()).add(line["prediction"])
    assert all(len(answers) == 1 for answers in said.values())
    seen = {}
    for line in sound(predictions(done[0], "full")):
        seen.setdefault(line["question"], set()).add(line["prediction"])
    assert any(len(answers) > 1 for answers in seen.values())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"plans": ["metor"]}, "no plan 'metor'"),
        ({"plans": ["full", "full"]}, "plan 'full' is named twice"),
        ({"plans": ["cut(decode.kept=3)"]}, "kept"),
        ({"tasks": ["easyvqa_color"]}, "no task, group or source 'easyvqa_color'"),
        ({"num_questions": 0}, r"eval\.num_questions is at least 1, got 0"),
    ],
)
def test_a_wrong_request_is_one_line(experiment, tmp_path, request_, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_request(experiment, source_dir=tmp_path, **request_)
    assert "\n" not in str(caught.value)


def test_two_plans_of_one_name_are_told_apart_by_their_texts(experiment, tmp_path):
    texts = ["fastv(layer=1, keep=4)", "fastv(layer=1, keep=8)"]
    plans = check_request(experiment, source_dir=tmp_path, plans=texts).plans
    assert [plan.name for plan in plans] == ["fastv", "fastv(layer=1,keep=8)"]


def test_an_unknown_eval_field_is_named(data_dir):
    values = config(data_dir, eval={"num_question": 3})
    with pytest.raises(ConfigError, match=r"config\.eval\.num_question: no such field.*num_quest"):
        load_experiment(values)


def test_a_template_without_the_question_is_refused(data_dir, tmp_path):
    values = config(data_dir, train={"finetune": {"steps": 1, "template": "plain"}})
    with pytest.raises(ConfigError, match="template 'plain' drops the question"):
        check_request(load_experiment(values), source_dir=tmp_path)


def test_a_prompt_that_is_too_long_is_one_line(data_dir, params, tmp_path):
    values = config(data_dir)
    values["eval"] = values["eval"] | {"prompt_lengths": (4, 12)}
    with pytest.raises(ConfigError, match=r"takes \d+ tokens, and there is room for 12"):
        evaluate_checkpoint(load_experiment(values), params, workdir=tmp_path, display="quiet")


def test_an_adaptive_plan_without_its_measured_scale_fails_before_anything_runs(
    experiment, params, tmp_path
):
    plan = "fastv(layer=1, keep=4, decode.budget=adaptive)"
    with pytest.raises(ValueError, match=r"plan 'fastv.* needs λ .*calibrate --plans"):
        evaluate_checkpoint(
            experiment, params, workdir=tmp_path, plans=("full", plan), display="quiet"
        )
    assert not (tmp_path / "predictions").exists()


def test_a_budget_above_the_tokens_fails_before_anything_runs(experiment, params, tmp_path):
    with pytest.raises(ValueError, match="only 25 tokens"):
        evaluate_checkpoint(
            experiment,
            params,
            workdir=tmp_path,
            plans=("full", "uniform(keep=99)"),
            display="quiet",
        )
    assert not (tmp_path / "predictions").exists()


def test_param_shapes_are_those_of_the_model(experiment):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    shapes = param_shapes(experiment, mesh=mesh)
    assert set(shapes) == {
        "clip",
        "pix2struct",
        "projector_clip",
        "projector_pix2struct",
        "llama",
    }
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(shapes))


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "evaluate.py", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_ends_in_one_line_without_a_workdir(data_dir, tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({config(data_dir)!r})\n"
    )
    ended = run_command(f"--config={path}", f"--workdir={tmp_path / 'nowhere'}")
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("error: workdir")
    assert "Traceback" not in ended.stderr
