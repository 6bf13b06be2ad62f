"""Evaluates one checkpoint: any tasks, under any plans, into one table."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import Progress

from meteor_jax.checkpoint import TOKENIZER_FOLDER
from meteor_jax.data.sources.records import Records
from meteor_jax.data.tokenizers import load_tokenizer
from meteor_jax.evaluation.files import (
    PREDICTIONS_FOLDER,
    count_bytes,
    describe_devices,
    prediction_line,
    read_line,
    versions,
    write_results,
)
from meteor_jax.evaluation.predictions import (
    Fingerprint,
    PredictionStore,
    digest_params,
    known_note,
    question_keys,
)
from meteor_jax.evaluation.request import EvaluationRequest, check_request
from meteor_jax.evaluation.results import (
    PlanResult,
    QuestionCost,
    Row,
    majority,
    make_rows,
    score_answer,
)
from meteor_jax.evaluation.tasks.registry import Question, collect_questions, open_sources
from meteor_jax.evaluation.visualize import draw_predictions
from meteor_jax.experiment.config import Experiment
from meteor_jax.experiment.eval_config import EvalConfig
from meteor_jax.experiment.plans import BLIND
from meteor_jax.inference.engine.data_shards import broadcast
from meteor_jax.inference.engine.engine import Engine
from meteor_jax.inference.engine.images import ImageHandle
from meteor_jax.inference.engine.predictor import fused_shape
from meteor_jax.inference.engine.request import Prediction, Prompt, Request, Timings
from meteor_jax.inference.load import make_engine, make_predictor
from meteor_jax.models.family import Family, build_model
from meteor_jax.parallel.distributed import is_main_process, main_process_first
from meteor_jax.progress import progress_bar
from meteor_jax.pruning.plan import PrunePlan

FIELDS = {"kept", "computed", "rows"}  # a line of another version may lack some: it is asked again
UNREADABLE = Prediction(unreadable=True)


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
    """Asks all questions under all plans; writes eval.json, predictions/ and pictures.

    Predictions and scores of other checkpoints in the same workdir stay.

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
    model = build_model(experiment.model)
    request = check_request(
        experiment, source_dir=source_dir, tasks=tasks, plans=plans, num_questions=num_questions
    )
    console = console or Console(quiet=display == "quiet" or not is_main_process())
    evaluator = _make_evaluator(
        experiment,
        params,
        request=request,
        source_dir=source_dir,
        folder=workdir / PREDICTIONS_FOLDER / ("no_step" if step is None else f"step_{step}"),
        log=console.print,
    )
    if evaluator.images_left_out:
        console.print(
            f"{evaluator.images_left_out} images dropped: their prompts exceed llama.max_positions."
        )
    with progress_bar(console=console, enabled=display == "bar") as progress:
        runs = []
        for plan in request.plans:
            run = evaluator.predict(plan, progress=progress)
            counts = _token_counts(model, params, plan=plan)
            runs.append(dataclasses.replace(run, result=dataclasses.replace(run.result, **counts)))
        # Questions about an unreadable image are scored 0 in the text-only baseline too.
        first = runs[0].result.predictions if runs else ()
        unreadable = [index for index, found in enumerate(first) if found.unreadable]
        blind = PrunePlan(name=BLIND)
        runs.append(
            evaluator.predict(blind, images=False, unreadable=unreadable, progress=progress)
        )
    results = [run.result for run in runs] + [majority(evaluator.questions)]
    tflops = {plan.name: _tflops(model, plan) for plan in request.plans}
    rows = make_rows(evaluator.questions, results, tflops=tflops)
    pruned = [plan for plan in request.plans if plan.prunes]
    if request.config.num_visualizations and request.plans:
        drawn = request.plans.index((pruned or request.plans)[0])
        draw_predictions(
            evaluator.engine,
            evaluator.questions,
            evaluator.prompts,
            runs[drawn].result,
            plan=request.plans[drawn],
            grids=model.token_grids(request.plans[drawn]),
            count=request.config.num_visualizations,
            workdir=workdir,
        )
    if is_main_process():
        write_results(
            workdir,
            questions=evaluator.questions,
            results=results,
            paths={run.result.plan: run.path for run in runs},
            rows=rows,
            plans=request.plans,
            step=step,
            config=dataclasses.asdict(experiment) | {"eval": dataclasses.asdict(request.config)},
            details=_details(evaluator, experiment, request)
            | {
                "param_bytes": count_bytes(params),
                "seconds": {run.result.plan: run.seconds for run in runs},
            },
        )
    return rows


@dataclasses.dataclass(frozen=True)
class PlanRun:
    """One plan's predictions, and how they came about.

    Attributes:
        seconds: of the parts of the work, and how many questions were "asked" in them: now, and
            in earlier starts that came to their end.
        path: of the predictions, on the main process.
    """

    result: PlanResult
    seconds: dict[str, float]
    path: Path


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Everything that the plans of one evaluation share.

    Attributes:
        engine: with a predictor for each plan, and one for the text-only baseline ("blind").
        sources: by name, the records of a split.
        questions: about one image side by side.
        depends_on: what every prediction depends on, beside its plan; see `Fingerprint`.
        folder: where predictions are kept.
        log: shows a line.
    """

    engine: Engine
    sources: Mapping[str, Records]
    questions: tuple[Question, ...]
    config: EvalConfig
    depends_on: Mapping[str, Any]
    folder: Path
    log: Callable[[str], None] = lambda line: None

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """One a question, with its images."""
        return tuple(map(self.engine.prepare, map(self._request, self.questions)))

    @property
    def images_left_out(self) -> int:
        """Images for which the decoder has no positions."""
        asked = sum(len(prompt.images) for prompt in self.prompts)
        return sum(question.num_images for question in self.questions) - asked

    def predict(
        self,
        plan: PrunePlan,
        *,
        images: bool = True,
        unreadable: Collection[int] = (),
        progress: Progress,
    ) -> PlanRun:
        """Asks every question under `plan`; what was answered before is not asked again.

        Args:
            plan: its name names the predictor and the file of predictions.
            images: False asks the questions alone.
            unreadable: questions that are not asked and scored 0.
        """
        prompts = self._prompts_of(plan, images=images)
        depends_on = {"plan": json.loads(plan.to_json())} | dict(self.depends_on)
        store = PredictionStore(self.folder, plan.name, fingerprint=Fingerprint(depends_on))
        keys = question_keys(self.questions, prompts)
        lines = broadcast(store.start() if is_main_process() else None)
        if store.note:
            self.log(store.note)
        known = {
            index: read_line(lines[key])
            for index, key in enumerate(keys)
            if key in lines and lines[key].keys() >= FIELDS
        }
        if known:
            rows = self.engine.sizes.batch // self.engine.shards.count
            self.log(known_note(plan.name, known.values(), total=len(keys), batch_rows=rows))
        predictions = known | dict.fromkeys(unreadable, UNREADABLE)
        scores = {index: self._score(index, found) for index, found in predictions.items()}

        def line(index: int) -> dict[str, Any]:
            content = prediction_line(self.questions[index], predictions[index], scores[index])
            return {"key": keys[index]} | content | {"seconds": predictions[index].seconds}

        left = [index for index in range(len(prompts)) if index not in predictions]
        bar = progress.add_task(plan.name, total=len(prompts), completed=len(predictions))
        timings = Timings()
        for found in self.engine.predict(
            [prompts[index] for index in left], timings=timings, warm_up=True
        ):
            index = left[found.index]
            if found.unreadable:
                found = dataclasses.replace(UNREADABLE, seconds=found.seconds)
            predictions[index], scores[index] = found, self._score(index, found)
            if is_main_process():
                store.append(line(index))
            progress.advance(bar)
        seconds = {"asked": len(left)} | timings.as_dict()
        if is_main_process():
            seconds = store.finish(map(line, range(len(prompts))), seconds=seconds)
        ordered = [predictions[index] for index in range(len(prompts))]
        return PlanRun(
            result=PlanResult(
                plan=plan.name,
                predictions=tuple(ordered),
                scores=tuple(scores[index] for index in range(len(prompts))),
                seconds=sum(found.seconds for found in ordered) / len(ordered),
            ),
            seconds=seconds,
            path=store.path,
        )

    def _request(self, question: Question, *, images: bool = True) -> Request:
        source, record = question.image

        def read(place: int) -> bytes:
            found = self.sources[source][record]
            return found["images"][place] if "images" in found else found["image"]

        return Request(
            question=question.question,
            images=[
                ImageHandle((source, record, place), functools.partial(read, place))
                for place in range(question.num_images if images else 0)
            ],
            max_new_tokens=self.config.new_tokens(question.task),
        )

    def _prompts_of(self, plan: PrunePlan, *, images: bool) -> list[Prompt]:
        prompts: Iterable[Prompt] = self.prompts
        if not images:
            requests = (self._request(question, images=False) for question in self.questions)
            prompts = map(self.engine.prepare, requests)
        return [dataclasses.replace(prompt, plan=plan.name) for prompt in prompts]

    def _score(self, index: int, found: Prediction) -> float:
        return 0.0 if found.unreadable else score_answer(self.questions[index], found.text)


def _make_evaluator(
    experiment: Experiment,
    params: Any,
    *,
    request: EvaluationRequest,
    source_dir: Path,
    folder: Path,
    log: Callable[[str], None],
) -> Evaluator:
    data, blind = experiment.data, PrunePlan(name=BLIND)
    engine = make_engine(
        experiment,
        params,
        plans=request.plans or (blind,),
        tokenizer=load_tokenizer(data.tokenizer, folder=source_dir / TOKENIZER_FOLDER),
        template=request.template,
    )
    baseline = make_predictor(
        experiment, params, plan=blind, tokenizer=engine.tokenizer, template=engine.template
    )
    with main_process_first("sources"):  # which builds those that are not there yet
        sources = open_sources(
            request.tasks,
            data_dir=data.data_dir,
            num_images=request.config.num_images,
            seed=data.source_seed,
        )
    return Evaluator(
        engine=dataclasses.replace(engine, predictors={**engine.predictors, BLIND: baseline}),
        sources=sources,
        questions=tuple(
            question
            for name, source in sources.items()
            for question in collect_questions(
                source,
                tasks=[task for task in request.tasks if task.source == name],
                num_questions=request.config.num_questions,
                seed=request.config.seed,
            )
        ),
        config=request.config,
        depends_on={
            "params": digest_params(params),
            "model": dataclasses.asdict(experiment.model),
            "data": {
                "data_dir": str(data.data_dir),
                "source_seed": data.source_seed,
                "num_images": request.config.num_images,
            },
            "versions": versions() | {"backend": jax.default_backend()},
        },
        folder=folder,
        log=log,
    )


def _details(
    evaluator: Evaluator, experiment: Experiment, request: EvaluationRequest
) -> dict[str, Any]:
    """What eval.json says of a run beside its config, plans and scores."""
    return {
        "params": evaluator.depends_on["params"],
        "template": request.template,
        "tasks": [task.name for task in request.tasks],
        "seeds": {"questions": request.config.seed, "source": experiment.data.source_seed},
        "devices": describe_devices(evaluator.engine.shards),
        "images_left_out": evaluator.images_left_out,
    }


def _token_counts(model: Family, params: Any, *, plan: PrunePlan) -> dict[str, Any]:
    """Fields of a `PlanResult`; none for a model without a decoder."""
    if model.output != "text":
        return {}
    return {
        "visual_tokens_fused": fused_shape(model.module, params, plan=plan).num_tokens,
        "layers": plan.decoder_layers,
        "depth": model.depth,
    }


def _tflops(model: Family, plan: PrunePlan) -> QuestionCost:
    def tflops(
        prompt_length: int, computed: tuple[float, ...], num_images: int, rows: int
    ) -> float:
        cost = model.count_cost(
            plan,
            text_tokens=prompt_length,
            computed=computed or None,
            num_images=num_images,
            rows=rows,
        )
        return cost.total_flops / 1e12

    return tflops
