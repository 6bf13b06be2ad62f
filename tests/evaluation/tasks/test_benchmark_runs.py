"""Every benchmark from its parquet folder through the real runner, with a random model."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.evaluation.tasks.benchmarks.datasets import FOLDERS
from meteor_jax.evaluation.tasks.benchmarks.registry import BENCHMARKS
from meteor_jax.evaluation.tasks.scoring.registry import SUBMISSION
from meteor_jax.experiment.config import load_experiment
from meteor_jax.inference.generate import start
from tests.evaluation import random_model
from tests.evaluation.random_model import config, make_params
from tests.evaluation.tasks.benchmark_fixtures import ROWS, write_folder

IN_FIXTURE = [name for name in BENCHMARKS if name != "mme_cognition"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    data_dir, workdir = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    for name in BENCHMARKS:
        write_folder(name, data_dir)
    values = config(data_dir)
    values["eval"] = {
        "prompt_lengths": (768,),
        "max_new_tokens_limit": 2,
        "num_visualizations": 0,
        "encode_batch_size": 4,
        "batch_size": 8,
        "visual_cache_images": 16,
    }
    experiment = load_experiment(values)
    before = start._cache_size()
    rows = evaluate_checkpoint(
        experiment,
        make_params(experiment),
        workdir=workdir,
        tasks=IN_FIXTURE,
        plans=("full",),
        display="quiet",
    )
    return workdir, rows, start._cache_size() - before


def test_every_task_has_a_row_or_a_submission(done):
    workdir, rows, _ = done
    of_full = {row.task: row for row in rows if row.plan == "full"}
    files = {path.stem for path in (workdir / "submissions/full").iterdir()}
    for name in IN_FIXTURE:
        if BENCHMARKS[name].task.metric == SUBMISSION:
            assert name in files
        else:
            row = of_full[name]
            assert 0 <= row.low <= row.score <= row.high <= 1 and row.corrupt == 0
            assert 1 <= row.n <= 2 * len(ROWS[BENCHMARKS[name].task.source])
    content = json.loads((workdir / "eval.json").read_text())
    assert content["tasks"] == IN_FIXTURE
    assert content["kept_tokens"]["full"].keys() == set(IN_FIXTURE)


def test_every_question_is_asked_once_with_its_images(done):
    workdir, _, compiled = done
    lines = (workdir / "predictions/no_step/full.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(set(keys)) == len(keys) >= 3 * len(FOLDERS) - 3
    assert compiled == 3  # prompts of one image, of two, and blind


@pytest.mark.slow
def test_two_processes_give_the_same_predictions_and_scores_as_one(tmp_path):
    for name in ("pope", "mmmu_val"):
        write_folder(name, tmp_path / "data")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tests.evaluation.random_model",
        tmp_path / "data",
        tmp_path / "two",
        str(port),
    ]
    pair = [
        subprocess.Popen(
            [*command, str(process)],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        )
        for process in range(2)
    ]
    try:
        assert [process.wait(timeout=600) for process in pair] == [0, 0]
    finally:
        for process in pair:
            process.kill()
    random_model.evaluate(tmp_path / "data", tmp_path / "one")
    contents = [json.loads((tmp_path / name / "eval.json").read_text()) for name in ("one", "two")]
    for content in contents:
        for row in content["rows"]:
            del row["seconds"]
    assert contents[0]["rows"] == contents[1]["rows"]
    assert contents[0]["params"] == contents[1]["params"]
    assert contents[1]["devices"]["processes"] == 2 and contents[1]["devices"]["shards"] == 4
    for plan in ("full", "cut", "blind"):
        said = [
            [line.split('"seconds"')[0] for line in path.read_text().splitlines()]
            for path in (
                tmp_path / name / f"predictions/no_step/{plan}.jsonl" for name in ("one", "two")
            )
        ]
        assert said[0] == said[1]
    assert (tmp_path / "two/kept_tokens.png").stat().st_size > 1000
