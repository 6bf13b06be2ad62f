"""Evaluates one checkpoint: any tasks, under any plans, into one table."""

from __future__ import annotations

import contextlib
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from meteor_jax.data.pipeline import Prompts, collate_prompts
from meteor_jax.data.sources import CorruptImage, decode_image, open_source
from meteor_jax.data.templates import get_template, stop_id
from meteor_jax.data.tokenizers import Tokenizer, load_tokenizer
from meteor_jax.evaluation.answering import (
    BlindAnswerer,
    ModelAnswerer,
    answer_questions,
    fused_shape,
    image_loader,
)
from meteor_jax.evaluation.config import EvalConfig, Request, check_request
from meteor_jax.evaluation.report import (
    CURVE_FILE,
    EVAL_FILE,
    PREDICTIONS_FOLDER,
    draw_curve,
    print_table,
    write_eval,
    write_predictions,
)
from meteor_jax.evaluation.results import (
    BLIND,
    PlanResult,
    QuestionCost,
    Row,
    majority,
    make_rows,
)
from meteor_jax.evaluation.tasks import Question, collect_questions
from meteor_jax.inference.visualize import draw_kept_tokens
from meteor_jax.models.cost import count_cost
from meteor_jax.models.meteor import Meteor, MeteorConfig
from meteor_jax.parallel import parameter_shardings
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.training.experiment import Experiment
from meteor_jax.training.state import init_params
from meteor_jax.types import Batch, PruneTrace

TOKENIZER_FOLDER = "tokenizer"
KEPT_FILE = "kept_tokens.png"
PROMPT_ROUNDING = 8  # T is a multiple of this, so that a few more questions compile nothing new


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything that the plans of one evaluation share.

    Attributes:
        sources: by name, the records of its test split.
        questions: about one image side by side.
        template: name of the prompts' template.
        prompt_length: the most tokens that a prompt may have.
    """

    model: Meteor
    params: Any
    tokenizer: Tokenizer
    sources: Mapping[str, Sequence[Mapping[str, Any]]]
    questions: tuple[Question, ...]
    template: str
    prompt_length: int
    config: EvalConfig

    @cached_property
    def prompts(self) -> Prompts:
        """One row a question, at most `PROMPT_ROUNDING` longer than the longest needs."""
        return self._prompts(num_images=1)

    def run(self, plan: PrunePlan, *, progress: Progress) -> PlanResult:
        """Asks every question under `plan`."""
        answerer = self._answerer(plan)
        answers, seconds = self._ask(answerer, self.prompts, name=plan.name, progress=progress)
        return PlanResult(
            plan=plan.name,
            answers=tuple(answers),
            visual_tokens_fused=fused_shape(self.model, self.params, plan=plan).num_tokens,
            layers=plan.decode.layers if plan.decode else (),
            depth=self.model.config.llama.depth,
            seconds=seconds,
        )

    def run_blind(self, *, progress: Progress) -> PlanResult:
        """Asks every question without its image, of the same model."""
        answerer = self._answerer(PrunePlan(name=BLIND), cls=BlindAnswerer)
        prompts = self._prompts(num_images=0)
        answers, seconds = self._ask(answerer, prompts, name=BLIND, progress=progress)
        return PlanResult(plan=BLIND, answers=tuple(answers), seconds=seconds)

    def draw(self, plan: PrunePlan, *, path: Path) -> None:
        """kept_tokens.png for the first images; each with its first question."""
        first_rows: dict[tuple[str, int], int] = {}
        for row, question in enumerate(self.questions):
            first_rows.setdefault(question.image, row)
        rows, loaded = [], []
        for row in first_rows.values():
            if len(rows) == self.config.draw_images:
                break
            with contextlib.suppress(CorruptImage):
                loaded.append(self._load_image(self.questions[row]))
                rows.append(row)
        if not rows:
            return
        images = np.stack(loaded)
        trace = jax.device_get(
            trace_examples(
                self.params, images, self.prompts.tokens[rows], self.prompts.text_valid[rows],
                model=self.model, plan=plan,
            )
        )
        texts = [
            f"{textwrap.fill(question.question, 34)}\nanswer: {question.answer}"
            for question in (self.questions[row] for row in rows)
        ]
        draw_kept_tokens(
            images, texts, trace, grids=token_grids(self.model.config, plan=plan), path=path,
            title=f"{plan.name}: tokens that stay",
        )

    def _prompts(self, *, num_images: int) -> Prompts:
        prompts = collate_prompts(
            [question.question for question in self.questions],
            tokenizer=self.tokenizer,
            template=self.template,
            text_length=self.prompt_length,
            batch_size=len(self.questions),
            num_images=num_images,
        )
        longest = int(prompts.text_valid.sum(1).max())
        length = min(-(-longest // PROMPT_ROUNDING) * PROMPT_ROUNDING, self.prompt_length)
        return Prompts(prompts.tokens[:, :length], prompts.text_valid[:, :length])

    @property
    def _load_image(self) -> Any:
        size = self.model.config.image_size
        return image_loader(self.sources, decode_image=decode_image, image_size=size)

    def _answerer(
        self, plan: PrunePlan, *, cls: type[ModelAnswerer] = ModelAnswerer
    ) -> ModelAnswerer:
        return cls(
            model=self.model,
            params=self.params,
            plan=plan,
            max_new_tokens=self.config.max_new_tokens,
            eos_id=stop_id(get_template(self.template), self.tokenizer),
        )

    def _ask(
        self, answerer: ModelAnswerer, prompts: Prompts, *, name: str, progress: Progress
    ) -> tuple[list, float]:
        bar = progress.add_task(name, total=len(self.questions))
        return answer_questions(
            self.questions,
            prompts,
            answerer,
            decode=self.tokenizer.decode,
            load_image=self._load_image,
            sizes=self.config.sizes,
            image_size=self.model.config.image_size,
            advance=lambda count: progress.advance(bar, count),
        )



def token_grids(config: MeteorConfig, *, plan: PrunePlan) -> dict[str, int]:
    """By encoder, in the order of `VisualTokens.encoder`, the side of its output grid."""
    if config.fusion == "pre":
        return {"all": config.grid}
    return {name: config.encoder(name).grid for name in config.active_encoders(plan)}


def trace_examples(
    params: Any, images: Any, tokens: Any, text_valid: Any, *, model: Meteor, plan: PrunePlan
) -> PruneTrace:
    """What `plan` keeps of some images, each with a question of its own.

    Shapes:
        images: uint8[I, H, W, 3]; tokens, text_valid: [I, T].
    """

    @jax.jit
    def trace(params: Any, images: Any, tokens: Any, text_valid: Any) -> PruneTrace:
        variables = {"params": params}
        encoded = model.apply(variables, images, plan=plan, method="encode_images")
        prefilled = model.apply(
            variables, jax.tree.map(lambda array: array[:, None], encoded.tokens),
            image_valid=jnp.ones((len(images), 1), bool), tokens=tokens, text_valid=text_valid,
            plan=plan, max_new_tokens=1, method="prefill",
        )
        return encoded.trace.replace(cuts=prefilled.cuts)

    return trace(params, images, tokens, text_valid)


def param_shapes(experiment: Experiment, *, mesh: Mesh) -> Any:
    """The parameters' shapes, and how they lie on `mesh`: what `restore_params` asks for."""
    config = experiment.model
    image = jax.ShapeDtypeStruct((1, 1, config.image_size, config.image_size, 3), np.uint8)
    text = jax.ShapeDtypeStruct((1, 8), np.int32)
    row = jax.ShapeDtypeStruct((1,), np.int32)
    flags = jax.ShapeDtypeStruct((1, 8), np.bool_)
    valid = jax.ShapeDtypeStruct((1, 1), np.bool_)
    batch = Batch(image, valid, text, flags, text, row)
    shapes = jax.eval_shape(
        lambda batch: init_params(Meteor(config), batch, seed=experiment.seed), batch
    )
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        parameter_shardings(shapes, mesh),
    )


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
    """Asks all questions under all plans; writes eval.json, predictions/ and the two pictures.

    Args:
        tasks, plans, num_questions: the config's `eval` where None.
        step: recorded in eval.json.
        source_dir: where tokenizer and calibration.json are read; `workdir` where None.
        display: "quiet" shows neither bar nor table.

    Raises:
        ConfigError: for an unknown task, plan or field; a template that drops the question.
        ValueError: for a prompt that is too long, or a plan that does not fit the model.
    """
    workdir, source_dir = Path(workdir), Path(source_dir or workdir)
    request = check_request(
        experiment, source_dir=source_dir, tasks=tasks, plans=plans, num_questions=num_questions
    )
    evaluation = _prepare(experiment, params, request=request, source_dir=source_dir)
    for plan in request.plans:  # a plan that does not fit fails now, not after the others have run
        fused_shape(evaluation.model, params, plan=plan)

    console = console or Console(quiet=display == "quiet")
    results = []

    def keep(result: PlanResult) -> None:
        write_predictions(workdir / PREDICTIONS_FOLDER, evaluation.questions, result)
        results.append(result)

    with _progress(console, enabled=display == "bar") as progress:
        for plan in request.plans:
            keep(evaluation.run(plan, progress=progress))
        keep(evaluation.run_blind(progress=progress))
    keep(majority(evaluation.questions))
    tflops = {plan.name: _tflops(evaluation.model.config, plan) for plan in request.plans}
    rows = make_rows(evaluation.questions, results, tflops=tflops)

    recorded = {name: dataclasses.asdict(getattr(experiment, name)) for name in ("model", "data")}
    recorded["eval"] = dataclasses.asdict(request.config)
    write_eval(workdir / EVAL_FILE, rows, config=recorded, plans=request.plans, step=step)
    draw_curve(workdir / CURVE_FILE, rows)
    pruned = [plan for plan in request.plans if plan.encode or plan.fuse or plan.decode]
    if request.config.draw_images and request.plans:
        evaluation.draw((pruned or request.plans)[0], path=workdir / KEPT_FILE)
    print_table(rows, console=console)
    return rows


def _prepare(
    experiment: Experiment, params: Any, *, request: Request, source_dir: Path
) -> Evaluation:
    config, data = request.config, experiment.data
    sources = {
        name: open_source(
            name, split="test", data_dir=data.data_dir, num_images=config.num_images,
            seed=data.source_seed,
        )
        for name in dict.fromkeys(task.source for task in request.tasks)
    }
    questions: tuple[Question, ...] = ()
    for name, source in sources.items():
        questions += collect_questions(
            source, tasks=[task for task in request.tasks if task.source == name],
            num_questions=config.num_questions, seed=config.seed,
        )
    return Evaluation(
        model=Meteor(experiment.model),
        params=params,
        tokenizer=load_tokenizer(data.tokenizer, folder=source_dir / TOKENIZER_FOLDER),
        sources=sources,
        questions=questions,
        template=request.template,
        prompt_length=data.text_length,
        config=config,
    )


def _tflops(config: MeteorConfig, plan: PrunePlan) -> QuestionCost:
    def tflops(text_tokens: float, kept: tuple[float, ...]) -> float:
        # The counter takes the text around the image; the image's own place is not text.
        cost = count_cost(
            config, plan, text_tokens=round(text_tokens) - 1, decode_tokens=kept or None
        )
        return cost.total_flops / 1e12

    return tflops


def _progress(console: Console, *, enabled: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not enabled)
