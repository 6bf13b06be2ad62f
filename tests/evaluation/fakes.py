"""An evaluation of a model that needs no parameters.

As a program, `python -m tests.evaluation.fakes WORKDIR`, it runs it; `--kill-at=N` ends it with
SIGKILL as the N-th batch is asked, `--port=P --process=I` makes it one of two.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
from rich.progress import Progress

from meteor_jax.data.sources.records import TaskSpec
from meteor_jax.evaluation.evaluator import Evaluator
from meteor_jax.evaluation.tasks.registry import Question
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.parallel.mesh import MeshConfig, make_mesh
from meteor_jax.pruning.plan import PrunePlan
from tests.inference.engine.fakes import GreyPredictor, make_engine, png

COUNT = TaskSpec("reading_count", "reading", "general", "exact_match")
YES = TaskSpec("reading_existence", "reading", "general", "yes_no")


def make_evaluator(
    folder, predictor, *, num_images=20, batch=4, params="none", mesh=None, log=print
):
    """Image i is of one grey, 10 · i, which is what the model answers; image i has i % 3 + 1
    questions, the later ones longer; image 5 is cut off."""
    records = [{"image": png(10 * i)[: 20 if i == 5 else None]} for i in range(num_images)]
    questions = tuple(
        Question(
            task=COUNT,
            record=i,
            image_id=i,
            question_id=100 * i + j,
            question=f"how grey? {j}" + 2 * j * " please",
            answer=str(10 * i),
        )
        for i in range(num_images)
        for j in range(i % 3 + 1)
    )
    return Evaluator(
        engine=make_engine({"fake": predictor}, encode=2, batch=batch, cache=4, mesh=mesh),
        sources={"reading": records},
        questions=questions,
        config=EvalConfig(max_new_tokens=6),
        depends_on={"params": params},
        folder=Path(folder),
        log=log,
    )


def run(folder, predictor=None, **options):
    """The plan "fake", evaluated; returns a `PlanRun` and the predictor."""
    predictor = predictor or GreyPredictor()
    with Progress(disable=True) as progress:
        evaluator = make_evaluator(folder, predictor, **options)
        return evaluator.predict(PrunePlan(name="fake"), progress=progress), predictor


def without_clock(result):
    """A `PlanResult` but for what depends on the clock and on how many are asked together."""
    found = tuple(
        dataclasses.replace(p, seconds=0, batch_rows=0, index=0) for p in result.predictions
    )
    return dataclasses.replace(result, predictions=found, seconds=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--process", type=int)
    arguments = parser.parse_args()
    mesh = None
    if arguments.port:
        jax.distributed.initialize(f"localhost:{arguments.port}", 2, arguments.process)
        mesh = make_mesh(MeshConfig())
    run(arguments.workdir, GreyPredictor(kill_at=arguments.kill_at), mesh=mesh)


if __name__ == "__main__":
    main()
