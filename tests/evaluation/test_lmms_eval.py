"""The plug-in, and lmms-eval's own task code as the judge of our scores; needs the extra `lmms`."""

import json
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models.registry_v2 import ModelRegistryV2

from meteor_jax.config import ConfigError
from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.evaluation.lmms_eval import MeteorJax, manifest
from meteor_jax.evaluation.results import PlanResult, make_rows, score_answer
from meteor_jax.evaluation.tasks.benchmarks.datasets import FOLDERS
from meteor_jax.evaluation.tasks.registry import REGISTRY, collect_questions, open_task_source
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference.engine.request import Prediction
from tests.evaluation.random_model import config, make_params, png, save_run
from tests.evaluation.tasks.benchmark_fixtures import IMAGES, ROWS, write_rows

ROOT = Path(__file__).parents[2]

NOISE = [{"bytes": png(i), "path": f"{i}.png"} for i in range(3)]
POPE = [
    {
        "id": str(i),
        "question_id": str(i),
        "question": f"Is there a {i} in the image?",
        "answer": "yes" if i % 2 else "no",
        "image_source": f"COCO_{i // 3}",
        "image": NOISE[i // 3],
        "category": ("random", "popular", "adversarial")[i % 3],
    }
    for i in range(9)
]
CHARTQA = [
    {"type": kind, "question": f"How much is {i}?", "answer": answer, "image": IMAGES[i // 2]}
    for i, (kind, answer) in enumerate(
        [
            ("human_test", "14"),
            ("augmented_test", "5%"),
            ("human_test", "Blue"),
            ("augmented_test", "0"),
            ("human_test", "2010"),
            ("augmented_test", "1,000"),
        ]
    )
]
MME = [
    {
        "question_id": f"{category}/{i // 2}.png",
        "image": IMAGES[i // 2],
        "category": category,
        "question": f"Is it {category} {i}? Please answer yes or no.",
        "answer": "No" if i % 2 else "Yes",
    }
    for category in ("OCR", "count")
    for i in range(6)
]
DOCVQA = [
    row | {"question": f"What is line {i}, exactly?"}
    for i, row in enumerate(ROWS["docvqa_val"] * 2)
]
# By lmms-eval's task: our task, the folder and split that lmms-eval reads, rows, and said answers.
CASES = {
    "pope": ("pope", "POPE", "test", POPE,
             ["yes", "No ", "yes.", "no", "YES", "maybe", "no", "no", "yes"]),
    "chartqa": ("chartqa", "ChartQA", "test", CHARTQA,
                ["14.6", "0.05", "blue", "0", "2100", "1000"]),
    "mme": ("mme_perception", "MME", "test", MME,
            ["Yes.", "no", "y", "yes, so", "no", "nothing", "n", "Yes", "yes", "no.", "not", "No"]),
    "docvqa_val": ("docvqa_val", "DocVQA", "validation", DOCVQA,
                   ["one  line", "twos", "3000", "Line", "nothing", "3,000"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A working directory where lmms-eval finds its data sets, and `data` where we find ours."""
    tmp_path = tmp_path_factory.mktemp("folders")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        # It caches data sets by name, and these change.
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
        write_folders(tmp_path)
        yield tmp_path


def write_folders(tmp_path):
    for ours, name, split, rows, _ in CASES.values():
        folder = FOLDERS[REGISTRY[ours].source]
        path = tmp_path / "data" / folder.directory / (folder.config or "data")
        write_rows(path / f"{folder.split}-00000-of-00001.parquet", rows)
        theirs = Path("lmms-lab-encoder") / name / "data" / f"{split}-00000-of-00001.parquet"
        write_rows(theirs, rows)
        tell_image_columns(theirs)
        (theirs.parents[1] / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {name}\n  default: true\n  data_files:\n"
            f"  - split: {split}\n    path: data/{split}-*\n---\n"
        )


def tell_image_columns(path):
    """Writes into a parquet file that its column `image` holds images, as published ones do."""
    table = pq.read_table(path)
    import datasets

    features = datasets.Features.from_arrow_schema(table.schema)
    features["image"] = datasets.Image()
    described = {"info": {"features": features.to_dict()}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(described)}), path)


class Scripted(lmms):
    """Says what it is told to say to each prompt."""

    def __init__(self, said):
        super().__init__()
        self.said = said

    def generate_until(self, requests):
        return [self.said[request.args[0]] for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    generate_until_multi_round = loglikelihood


def judge(model, tasks):
    """lmms-eval's scores and samples by task."""
    done = simple_evaluate(
        model=model,
        tasks=list(tasks),
        batch_size=1,
        log_samples=True,
        bootstrap_iters=0,
        process_docs_parallel=1,
    )
    return done["results"], done["samples"]


@pytest.fixture(scope="module")
def judged(folders):
    """Our row of every task, and what lmms-eval says of the same answers to the same prompts."""
    said, rows = {}, {}
    for task, (ours, *_, texts) in CASES.items():
        spec = REGISTRY[ours]
        source = open_task_source(spec, data_dir=folders / "data")
        questions = collect_questions(source, tasks=[spec])
        said |= dict(zip((question.question for question in questions), texts, strict=True))
        predictions = tuple(Prediction(text=text) for text in texts)
        scores = tuple(map(score_answer, questions, texts))
        rows[task], *_ = make_rows(questions, [PlanResult("full", predictions, scores)], tflops={})
    return rows, judge(Scripted(said), CASES)[0]


@pytest.mark.parametrize("task", CASES)
def test_the_same_answers_have_the_same_score(judged, task):
    row, theirs = judged[0][task], judged[1][task]
    expected = {
        "pope": {
            "pope_accuracy": row.score,
            "pope_f1_score": row.parts.get("f1"),
            "pope_recall": row.parts.get("recall"),
        },
        "chartqa": {"relaxed_overall": row.score},
        "mme": {"mme_perception_score": row.parts.get("points")},
        "docvqa_val": {"anls": row.score},
    }[task]
    assert 0 < row.score < 1
    for name, score in expected.items():
        assert theirs[f"{name},none"] == pytest.approx(score, abs=1e-9), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms") / "run"
    save_run(folder, config(folder))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return MeteorJax(
        checkpoint=str(checkpoint),
        plan="'cut(decode.keep=(5,))'",
        batch_size="4",
        max_new_tokens_limit=3,
    )


def test_it_answers_as_our_own_evaluation_does(folders, checkpoint, model):
    _, samples = judge(model, ["pope"])
    theirs = {
        POPE[sample["doc_id"]]["question"]: "".join(sample["filtered_resps"])
        for sample in samples["pope"]
    }
    values = config(folders / "data")
    values["eval"] = {"max_new_tokens_limit": 3, "num_visualizations": 0, "batch_size": 4}
    experiment = load_experiment(values)
    evaluate_checkpoint(
        experiment,
        make_params(experiment),
        workdir=folders / "ours",
        tasks=["pope"],
        plans=["cut(decode.keep=(5,))"],
        display="quiet",
    )
    (path,) = (folders / "ours/predictions/no_step").glob("cut*.jsonl")
    ours = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["question"].split("\n")[0]: line["prediction"] for line in ours} == theirs
    assert len(set(theirs.values())) > 1


def request(context, *visuals, index=0, **options):
    return Instance(
        request_type="generate_until",
        idx=0,
        arguments=(context, options, lambda doc: doc["visuals"], index, "fake", "test"),
        metadata={"task": "fake", "doc_id": index, "repeats": 1},
    )


def ask(model, *cases):
    """Each case: a context, its images, and options."""
    documents = [{"visuals": list(visuals)} for _, visuals, _ in cases]
    model.task_dict["fake"] = {"test": documents}
    return model.generate_until(
        [request(context, index=i, **options) for i, (context, _, options) in enumerate(cases)]
    )


def grey(value):
    return Image.new("L", (30, 20), value)


def test_order_images_and_ends(model):
    cases = [
        (f"what is {i}?" + " please" * (i % 3), [grey(40 * i)] * (i % 3), {"max_new_tokens": 2})
        for i in range(7)
    ]
    together = ask(model, *cases)
    assert together == [ask(model, case)[0] for case in cases]
    assert all(together) and len(set(together)) > 1
    (whole,) = ask(model, ("what is it?", [grey(3)], {"max_new_tokens": 3}))
    (cut,) = ask(model, ("what is it?", [grey(3)], {"max_new_tokens": 3, "until": [whole[-1]]}))
    assert cut == whole.split(whole[-1])[0].strip() and cut != whole


def test_what_it_cannot_do_is_one_line(model, checkpoint):
    with pytest.raises(ConfigError, match="answers greedily"):
        ask(model, ("what?", [grey(1)], {"temperature": 0.7, "do_sample": True}))
    with pytest.raises(ConfigError, match="takes images"):
        ask(model, ("what?", ["video.mp4"], {}))
    with pytest.raises(ConfigError, match="batch_size: expected a positive number"):
        MeteorJax(checkpoint=str(checkpoint), batch_size="auto")
    with pytest.raises(ConfigError, match="no such argument pretrained"):
        MeteorJax(checkpoint=str(checkpoint), pretrained="x")


def test_lmms_eval_finds_it():
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("meteor_jax") is MeteorJax
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["lmms_eval.models"]["meteor_jax"]
    assert named == f"{manifest.__module__}:manifest"
