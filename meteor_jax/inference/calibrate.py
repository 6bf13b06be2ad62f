"""Measures what plans need offline, feature ranks and λ, and writes calibration.json.

    meteor calibrate --config=configs/tiny.py --workdir=runs/tiny

Training does the same: ranks before the stage that asks for them, λ before each evaluation.

I images, N tokens, E encoder width, B prompts, K kept tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from meteor_jax.checkpoint import CALIBRATION_FILE, TOKENIZER_FOLDER
from meteor_jax.config import ConfigError
from meteor_jax.data import pipeline
from meteor_jax.data.sources.registry import decode_image
from meteor_jax.data.tokenizers import Tokenizer, load_tokenizer
from meteor_jax.experiment.config import Experiment, load_experiment
from meteor_jax.experiment.eval_config import prompt_template
from meteor_jax.experiment.flags import parse_flags
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.inference.budgets import Questions, calibrate_budget, evenness_note
from meteor_jax.inference.engine.data_shards import DataShards
from meteor_jax.inference.layout import inference_mesh
from meteor_jax.inference.load import load_params
from meteor_jax.inference.ranks import calibrate_ranks, feature_shapes, full_rank_warnings
from meteor_jax.models.family import build_model
from meteor_jax.parallel.distributed import is_main_process
from meteor_jax.pruning.budgets import Adaptive
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.points import NUM_SEGMENTS
from meteor_jax.pruning.text import split_plans
from meteor_jax.types import Array

NUM_IMAGES = 64
NUM_QUESTIONS = 4  # about an image: those of one image keep alike numbers of tokens


@flax.struct.dataclass
class CalibrationBatch:
    """Images uint8[I, H, W, 3], and the first, second, … question about each of them."""

    images: Array
    questions: tuple[Questions, ...]


def calibration_batch(
    experiment: Experiment, *, tokenizer: Tokenizer, records: Sequence[Sequence[Any]]
) -> CalibrationBatch:
    """The first images of the training split, over all sources, each with its first questions.

    Images that cannot be decoded and questions that do not fit are passed over.

    Raises:
        ConfigError: if no source has one of both.
    """
    config, count = experiment.data, max(NUM_IMAGES // len(records), 1)
    template = prompt_template(experiment.eval.template or experiment.train.finetune.template)

    def prompt_of(question: str) -> pipeline.Prompts:
        return pipeline.collate_prompts(
            [question],
            tokenizer=tokenizer,
            template=template,
            text_length=config.text_length,
            batch_size=1,
        )

    def usable(source: Sequence[Any]) -> Iterator[tuple[np.ndarray, list[pipeline.Prompts]]]:
        of_images = filter(None, map(pipeline.questions_about_one_image, source))
        for asked in itertools.islice(of_images, 2 * count):
            try:
                image = decode_image(asked[0].image, size=config.image_size)
                prompts = [prompt_of(asked[0].question)]
            except ValueError as error:
                logging.warning("not calibrated with: %s", error)
                continue
            for further in asked[1:NUM_QUESTIONS]:
                with contextlib.suppress(ValueError):
                    prompts.append(prompt_of(further.question))
            yield image, prompts

    chosen = [pair for source in records for pair in itertools.islice(usable(source), count)]
    if not chosen:
        raise ConfigError(
            "nothing to calibrate with: among the first records no image can be read, or no "
            f"question fits data.text_length={config.text_length}; raise it, or look at the files."
        )
    images, prompts = zip(*chosen, strict=True)
    questions = []
    for place in range(max(map(len, prompts))):
        # An image with fewer questions repeats its last, which does not count.
        here = [of_image[min(place, len(of_image) - 1)] for of_image in prompts]
        questions.append(
            Questions(
                tokens=np.concatenate([prompt.tokens for prompt in here]),
                text_valid=np.concatenate([prompt.text_valid for prompt in here]),
                asked=np.array([place < len(of_image) for of_image in prompts]),
            )
        )
    return CalibrationBatch(np.stack(images), tuple(questions))


def calibrate_plans(
    model: nn.Module,
    params: Any,
    *,
    plans: Iterable[PrunePlan],
    batch: CalibrationBatch,
    calibration: Calibration,
    batch_size: int = 32,
) -> Calibration:
    """`calibration` with λ and totals measured for each adaptive plan among `plans`, and the ranks
    too where one goes by ranks that nothing measured. The totals are for the mesh in force.

    Warns where K differs so little that a fixed budget would cost less, in such batches.
    """
    plans, num_shards = list(plans), DataShards.current().count
    if any(_lacks_ranks(plan, calibration) for plan in plans):
        measured = calibrate_ranks(model, params, batch.images, plans=plans)
        ranks = measured | calibration.ranks
        calibration = dataclasses.replace(calibration, ranks=ranks)
    for plan in plans:
        if plan.is_adaptive:
            budget = calibrate_budget(
                model,
                params,
                batch.images,
                questions=batch.questions,
                plan=plan.calibrated(calibration),
                num_shards=num_shards,
            )
            calibration = calibration.with_plan(plan.with_decoder_budgets(budget.budgets))
            note = evenness_note(
                model.config,
                plan.calibrated(calibration),
                budget,
                rows=-(-batch_size // num_shards),
                num_shards=num_shards,
                text_tokens=int(batch.questions[0].text_valid.sum(1).max()),
            )
            if note and is_main_process():
                logging.warning("%s", note)
    return calibration


def needs_measuring(plans: Iterable[PrunePlan], calibration: Calibration) -> bool:
    """Whether `calibrate_plans` has something to do, for which it needs a batch."""
    return any(plan.is_adaptive or _lacks_ranks(plan, calibration) for plan in plans)


def _lacks_ranks(plan: PrunePlan, calibration: Calibration) -> bool:
    return any(str(kind) not in calibration.ranks for kind in plan.missing_ranks)


def main(argv: list[str]) -> int:
    """Returns the exit code: 2, after one line, for what the user can put right."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument '{argv[1]}'; flags start with --.")
        calibrate_workdir(load_experiment(CONFIG.value), workdir=Path(WORKDIR.value))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def calibrate_workdir(experiment: Experiment, *, workdir: Path) -> None:
    """Measures with the newest checkpoint of `workdir`, and writes its calibration.json.

    Ranks that the run was trained with stay, unless --ranks asks to measure them anew.
    """
    model, path = build_model(experiment.model).module, workdir / CALIBRATION_FILE
    calibration = Calibration.load(path)
    names = split_plans(PLANS.value) if PLANS.value else list(experiment.plans)
    plans = resolve_plans(names, library=experiment.plans, calibration=calibration)
    mesh = inference_mesh(experiment)
    with jax.set_mesh(mesh):
        params, _ = load_params(experiment, workdir, mesh=mesh)
        records = pipeline.open_sources(experiment.data)
        tokenizer = load_tokenizer(experiment.data.tokenizer, folder=workdir / TOKENIZER_FOLDER)
        batch = calibration_batch(experiment, tokenizer=tokenizer, records=records)
        if RANKS.value or not calibration.ranks:
            ranks = calibrate_ranks(model, params, batch.images, plans=plans)
            calibration = dataclasses.replace(calibration, ranks=ranks)
        calibration = calibrate_plans(
            model,
            params,
            plans=plans,
            batch=batch,
            calibration=calibration,
            batch_size=experiment.eval.batch_size,
        )
    calibration.save(path)
    console, shapes = Console(), feature_shapes(model, params)
    console.print(rank_table(calibration, shapes=shapes))
    table = Table("plan", "λ of each step", "totals of 32 rows, a row", title=str(path))
    for plan in filter(None, map(calibration.measured, calibration.plans)):
        budgets = [s.budget for s in plan.decoder_steps if isinstance(s.budget, Adaptive)]
        edges = (dict(budget.edges).get(32, ()) for budget in budgets)
        table.add_row(
            plan.name,
            ", ".join(f"{budget.lambda_:.2f}" for budget in budgets),
            ", ".join("/".join(f"{edge:.1f}" for edge in of_step) for of_step in edges),
        )
    if calibration.plans:
        console.print(table)
    for line in full_rank_warnings(plans, calibration=calibration, shapes=shapes):
        console.print(f"warning: {line}", soft_wrap=True, markup=False, highlight=False)


def rank_table(calibration: Calibration, *, shapes: Mapping[str, tuple[int, int]]) -> Table:
    """Ranks by kind, encoder and boundary, beside the (tokens, width) that they are at most."""
    segments = [f"segment {boundary + 1}" for boundary in range(NUM_SEGMENTS)]
    table = Table(title="feature ranks, mean over images")
    for column in ("rank", "encoder"):
        table.add_column(column, no_wrap=True)
    for column in ("tokens", "width", *segments):
        table.add_column(column, justify="right")
    for kind, ranks in calibration.ranks.items():
        for name, values in ranks.items():
            shape = map(str, shapes.get(name, ("", "")))
            table.add_row(kind, name, *shape, *(f"{value:.1f}" for value in values))
        table.add_section()
    return table


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
    WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a trained run.")
    PLANS = flags.DEFINE_string("plans", None, "Plans to measure λ for (default: config.plans).")
    RANKS = flags.DEFINE_bool("ranks", False, "Measure the ranks anew.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
