"""Measures what plans need offline: feature ranks, and λ of adaptive plans.

`meteor calibrate` writes both into a run's calibration.json; training does the same, ranks before
the stage that asks for them, λ before each evaluation.

I images, N tokens, E encoder width, B prompts, K kept tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import numpy as np
from absl import logging
from jaxtyping import UInt8

from meteor_jax.config import ConfigError
from meteor_jax.data import pipeline
from meteor_jax.data.sources.records import Records
from meteor_jax.data.sources.registry import decode_image
from meteor_jax.data.tokenizers import Tokenizer
from meteor_jax.experiment.config import Experiment
from meteor_jax.experiment.eval_config import prompt_template
from meteor_jax.inference.budgets import Questions, calibrate_budget, evenness_note
from meteor_jax.inference.engine.data_shards import DataShards
from meteor_jax.inference.ranks import calibrate_ranks
from meteor_jax.parallel.distributed import is_main_process
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import AnyArray

NUM_IMAGES = 64
NUM_QUESTIONS = 4  # about an image: those of one image keep alike numbers of tokens


class CalibrationBatch(flax.struct.PyTreeNode):
    """Images, and the first, second, … question about each of them."""

    images: UInt8[AnyArray, "I H W 3"]
    questions: tuple[Questions, ...]


def calibration_batch(
    experiment: Experiment, *, tokenizer: Tokenizer, records: Sequence[Records]
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

    def usable(source: Records) -> Iterator[tuple[np.ndarray, list[pipeline.Prompts]]]:
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
