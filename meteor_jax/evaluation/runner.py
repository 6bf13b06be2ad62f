"""Evaluates one checkpoint: any tasks, under any plans, into one table."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console

from meteor_jax.checkpoint import TOKENIZER_FOLDER
from meteor_jax.config import ConfigError
from meteor_jax.data.tokenizers import load_tokenizer
from meteor_jax.evaluation.evaluator import Evaluation
from meteor_jax.evaluation.files import (
    EVAL_FILE,
    PREDICTIONS_FOLDER,
    file_name,
    kept_file,
    versions,
    write_eval,
    write_predictions,
)
from meteor_jax.evaluation.predictions import digest_params
from meteor_jax.evaluation.request import Request, check_request
from meteor_jax.evaluation.results import QuestionCost, Row, majority, make_rows
from meteor_jax.evaluation.tasks.benchmarks.submission import write_submissions
from meteor_jax.evaluation.tasks.registry import Question, collect_questions, open_task_source
from meteor_jax.evaluation.token_stats import kept_tokens
from meteor_jax.evaluation.visualize import draw_answers
from meteor_jax.experiment.config import Experiment
from meteor_jax.inference.engine.data_shards import Lanes
from meteor_jax.inference.engine.predictor import check_fits
from meteor_jax.inference.engine.prompts import Room
from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.models.family import count_cost
from meteor_jax.parallel.distributed import is_main_process, main_process_first
from meteor_jax.progress import progress_bar
from meteor_jax.pruning.plan import PrunePlan

SUBMISSIONS_FOLDER = "submissions"


def evaluate_checkpoint(
    experiment: Experiment,
    params: Any,
    *,
    workdir: str | Path,
    tasks: Sequence[str] | None = None,
    plans: Sequence[str] | None = None,
    num_questions: int | None = None,
    step: int | None = None,
    source_dir: str | Path | None = None,
    display: Literal["bar", "quiet"] = "bar",
    console: Console | None = None,
) -> list[Row]:
    """Asks all questions under all plans; writes eval.json, predictions/ and
    pictures. Answers and
    scores of other checkpoints in the same workdir stay.

    Args:
        tasks, plans, num_questions: the config's `eval` where None.
        step: of the checkpoint; recorded in eval.json, and part of what files are called.
        source_dir: where tokenizer and calibration.json are read; `workdir` where None.
        display: "quiet" shows no progress bar.

    Raises:
        ConfigError: for an unknown task, plan or field; a template that drops the question.
        ValueError: for a prompt that is too long, or a plan that does not fit the model or was not
            calibrated.
    """
    workdir, source_dir = Path(workdir), Path(source_dir or workdir)
    request = check_request(
        experiment, source_dir=source_dir, tasks=tasks, plans=plans, num_questions=num_questions
    )
    for plan in request.plans:  # before the first of them takes its time
        plan.check_measured()
    folder = workdir / PREDICTIONS_FOLDER / ("no_step" if step is None else f"step_{step}")
    console = console or Console(quiet=display == "quiet" or not is_main_process())
    evaluation = _prepare(
        experiment,
        params,
        request=request,
        source_dir=source_dir,
        folder=folder,
        say=console.print,
    )
    if evaluation.images_left_out:
        console.print(f"{evaluation.images_left_out} images have no room and are left out.")
    with progress_bar(console=console, enabled=display == "bar") as progress:
        runs = [evaluation.run(plan, progress=progress) for plan in request.plans]
        first = runs[0].result.answers if runs else ()
        corrupt = [index for index, answer in enumerate(first) if answer.corrupt]
        runs.append(evaluation.run_blind(corrupt=corrupt, progress=progress))
    results = [run.result for run in runs] + [majority(evaluation.questions)]
    tflops = {plan.name: _tflops(evaluation.model.config, plan) for plan in request.plans}
    rows = make_rows(evaluation.questions, results, tflops=tflops)

    pruned = [plan for plan in request.plans if plan.prunes]
    if request.config.num_visualizations and request.plans:
        drawn = request.plans.index((pruned or request.plans)[0])
        draw_answers(evaluation, runs[drawn].result, plan=request.plans[drawn], workdir=workdir)
    if is_main_process():
        paths = {run.result.plan: run.path for run in runs}
        paths[results[-1].plan] = write_predictions(folder, evaluation.questions, results[-1])
        for result in results[: len(request.plans)]:
            write_submissions(
                workdir / SUBMISSIONS_FOLDER / file_name(result.plan),
                evaluation.questions,
                [answer.prediction for answer in result.answers],
            )
        write = functools.partial(
            write_eval,
            rows=rows,
            plans=request.plans,
            step=step,
            config=dataclasses.asdict(experiment) | {"eval": dataclasses.asdict(request.config)},
            details=_details(experiment, evaluation, request=request)
            | {
                "seconds": {run.result.plan: run.seconds for run in runs},
                "kept_tokens": kept_tokens(evaluation.questions, results),
                "predictions": {
                    plan: path.relative_to(workdir).as_posix() for plan, path in paths.items()
                },
            },
        )
        write(kept_file(workdir, step=step, params=evaluation.depends_on["params"]))
        write(workdir / EVAL_FILE)
    return rows


def _details(experiment: Experiment, evaluation: Evaluation, *, request: Request) -> dict[str, Any]:
    """What eval.json says of a run beside its config, plans and scores."""
    return {
        "params": evaluation.depends_on["params"],
        "template": request.template,
        "tasks": [task.name for task in request.tasks],
        "seeds": {"questions": request.config.seed, "source": experiment.data.source_seed},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "lanes": evaluation.lanes.count,
            "mesh": dict(evaluation.lanes.mesh.shape) if evaluation.lanes.mesh else {},
        },
        "param_bytes": dict(_bytes_by_dtype(evaluation.params)),
        "images_left_out": evaluation.images_left_out,
    }


def _bytes_by_dtype(params: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for leaf in jax.tree.leaves(params):
        found[leaf.dtype.name] += leaf.nbytes
    return found


def _prepare(
    experiment: Experiment,
    params: Any,
    *,
    request: Request,
    source_dir: Path,
    folder: Path,
    say: Callable[[str], None],
) -> Evaluation:
    config, data, model = request.config, experiment.data, Meteor(experiment.model)
    fused = []
    for plan in request.plans:  # one that does not fit fails now, not after the others have run
        try:
            fused.append(check_fits(model, params, plan=plan))
        except ValueError as error:
            raise ConfigError(f"plan '{plan.name}': {error}") from error
    with main_process_first("sources"):  # which builds those that are not there yet
        sources = {
            task.source: open_task_source(
                task, data_dir=data.data_dir, num_images=config.num_images, seed=data.source_seed
            )
            for task in {task.source: task for task in request.tasks}.values()
        }
    questions: tuple[Question, ...] = ()
    for name, source in sources.items():
        questions += collect_questions(
            source,
            tasks=[task for task in request.tasks if task.source == name],
            num_questions=config.num_questions,
            seed=config.seed,
        )
    return Evaluation(
        model=model,
        params=params,
        tokenizer=load_tokenizer(data.tokenizer, folder=source_dir / TOKENIZER_FOLDER),
        sources=sources,
        questions=questions,
        template=request.template,
        config=config,
        room=Room(
            lengths=config.prompt_lengths,
            positions=experiment.model.llama.max_positions,
            image_positions=max((shape.span for shape in fused), default=1),
        ),
        lanes=Lanes.in_force(),
        depends_on={
            "params": digest_params(params),
            "model": dataclasses.asdict(experiment.model),
            "data": {
                "data_dir": str(data.data_dir),
                "source_seed": data.source_seed,
                "num_images": config.num_images,
            },
            "versions": versions() | {"backend": jax.default_backend()},
        },
        folder=folder,
        say=say,
    )


def _tflops(config: MeteorConfig, plan: PrunePlan) -> QuestionCost:
    def tflops(
        prompt_length: int, computed: tuple[float, ...], num_images: int, rows: int
    ) -> float:
        cost = count_cost(
            config,
            plan,
            text_tokens=prompt_length,
            computed=computed or None,
            num_images=num_images,
            rows=rows,
        )
        return cost.total_flops / 1e12

    return tflops
