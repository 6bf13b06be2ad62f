"""Measures what plans need offline, feature ranks and λ, and writes calibration.json.

    python -m meteor_jax.tools.calibrate --config=configs/tiny.py --workdir=runs/tiny

Training does the same: ranks before the stage that asks for them, λ before each evaluation.

I images, N tokens, E encoder width, B prompts, K kept tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from meteor_jax.checkpoint import CALIBRATION_FILE, TOKENIZER_FOLDER
from meteor_jax.config import ConfigError
from meteor_jax.data import pipeline
from meteor_jax.data.sources import decode_image
from meteor_jax.data.tokenizers import Tokenizer, load_tokenizer
from meteor_jax.distributed import fetch
from meteor_jax.evaluation.config import eval_config, prompt_template, resolve_plans
from meteor_jax.evaluation.loading import load_params
from meteor_jax.inference.ranks import calibrate_ranks, feature_shapes, full_rank_warnings
from meteor_jax.models.meteor import Meteor
from meteor_jax.parallel import make_mesh
from meteor_jax.pruning.baselines import split_plans
from meteor_jax.pruning.encode import NUM_SEGMENTS
from meteor_jax.pruning.plan import Calibration, DecodePlan, PrunePlan
from meteor_jax.training.experiment import Experiment, load_experiment, parse_flags
from meteor_jax.types import Array, CutTrace

NUM_IMAGES = 64


@flax.struct.dataclass
class CalibrationBatch:
    """Prompts with their images: uint8[B, H, W, 3], int32[B, T], bool[B, T]."""

    images: Array
    tokens: Array
    text_valid: Array


def calibration_batch(
    experiment: Experiment, *, tokenizer: Tokenizer, records: Sequence[Sequence[Any]]
) -> CalibrationBatch:
    """The first images of the training split, over all sources, each with its first question.

    Images that cannot be decoded and questions that do not fit are passed over.

    Raises:
        ConfigError: if no source has one of both.
    """
    config, count = experiment.data, max(NUM_IMAGES // len(records), 1)
    template = prompt_template(
        eval_config(experiment).template or experiment.train.finetune.template
    )

    def usable(source: Sequence[Any]) -> Iterator[tuple[np.ndarray, pipeline.Prompts]]:
        for asked in pipeline.first_questions([source], count=2 * count):
            try:
                image = decode_image(asked.image, size=config.image_size)
                prompt = pipeline.collate_prompts(
                    [asked.question], tokenizer=tokenizer, template=template,
                    text_length=config.text_length, batch_size=1,
                )
            except ValueError as error:
                logging.warning("not calibrated with: %s", error)
                continue
            yield image, prompt

    chosen = [pair for source in records for pair in itertools.islice(usable(source), count)]
    if not chosen:
        raise ConfigError(
            "nothing to calibrate with: among the first records no image can be read, or no "
            f"question fits data.text_length={config.text_length}; raise it, or look at the files."
        )
    images, prompts = zip(*chosen, strict=True)
    return CalibrationBatch(
        np.stack(images), np.concatenate([prompt.tokens for prompt in prompts]),
        np.concatenate([prompt.text_valid for prompt in prompts]),
    )


def calibrate_plans(
    model: Meteor, params: Any, *, plans: Iterable[PrunePlan], batch: CalibrationBatch,
    calibration: Calibration,
) -> Calibration:
    """`calibration` with λ measured for each adaptive plan among `plans`, and the ranks too where
    one goes by ranks that nothing measured."""
    plans = list(plans)
    if any(_lacks_ranks(plan, calibration) for plan in plans):
        measured = calibrate_ranks(model, params, batch.images, plans=plans)
        ranks = measured | calibration.ranks
        calibration = dataclasses.replace(calibration, ranks=ranks)
    for plan in plans:
        if _is_adaptive(plan):
            measured = plan.calibrated(calibration)
            scale = calibrate_scales(model, params, plan=measured, batches=[batch])
            calibration = calibration.with_scale(plan, scale)
    return calibration


def needs_measuring(plans: Iterable[PrunePlan], calibration: Calibration) -> bool:
    """Whether `calibrate_plans` has something to do, for which it needs a batch."""
    return any(_is_adaptive(plan) or _lacks_ranks(plan, calibration) for plan in plans)


def _is_adaptive(plan: PrunePlan) -> bool:
    return plan.decode is not None and plan.decode.budget == "adaptive"


def _lacks_ranks(plan: PrunePlan, calibration: Calibration) -> bool:
    encode = plan.encode
    by_rank = encode is not None and encode.by_rank
    return by_rank and str(encode.rank_kind) not in calibration.ranks and not encode.ranks


def calibrate_scales(
    model: Meteor, params: Any, *, plan: PrunePlan, batches: Sequence[CalibrationBatch]
) -> tuple[float, ...]:
    """λ of every cut of an adaptive plan, such that the mean of K over `batches` is its `keep`.

    Cut after cut, because what a cut sees, and how many tokens reach it, depends on those before.
    """
    # One bucket: how much room a batch is packed into changes no K, and there is less to compile.
    decode = dataclasses.replace(
        plan.decode, scale=(1.0,) * len(plan.decode.layers), num_buckets=1
    )
    for cut in range(len(decode.layers)):
        current = dataclasses.replace(plan, decode=decode)
        runs = [_run(model, params, batch, plan=current) for batch in batches]
        scale = list(decode.scale)
        scale[cut] = fit_scale(
            np.concatenate([chosen_mass(run.cuts[cut], plan=decode) for run in runs]),
            low_high=decode.bounds(cut), target=decode.keep[cut],
            available=np.concatenate([run.num_before(cut) for run in runs]),
        )
        decode = dataclasses.replace(decode, scale=tuple(scale))
    return decode.scale


def fit_scale(
    masses: np.ndarray, *, low_high: tuple[int, int], target: float, available: np.ndarray
) -> float:
    """λ by bisection: the mean of min(clip(round(λ · mass), low, high), available) meets `target`.

    Shapes:
        masses: float[B]; available: int[B], the tokens of each example that reach the cut.

    Raises:
        ValueError: if no attention falls on the image, so that no λ can.
    """
    if not masses.max() > 0:
        raise ValueError("no text attention falls on the image; is the model trained?")

    def mean(scale: float) -> float:
        return float(np.minimum(np.clip(np.round(scale * masses), *low_high), available).mean())

    low, high = 0.0, 2 * low_high[1] / masses[masses > 0].min()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < target else (low, middle)
    return float(high)


@flax.struct.dataclass
class _Run:
    """What the cuts did, and how many visual tokens of an image reached the first."""

    cuts: tuple[CutTrace, ...]
    num_visual: int = flax.struct.field(pytree_node=False)

    def num_before(self, cut: int) -> np.ndarray:
        """int[B]: the visual tokens of each example that reach a cut."""
        if cut:
            return np.asarray(self.cuts[cut - 1].num_kept)
        return np.full(self.cuts[0].num_kept.shape, self.num_visual)


def _run(model: Meteor, params: Any, batch: CalibrationBatch, *, plan: PrunePlan) -> _Run:
    return fetch(_cuts(model, params, batch, plan=plan))


@jax.jit(static_argnames=("model", "plan"))
def _cuts(model: Meteor, params: Any, batch: CalibrationBatch, *, plan: PrunePlan) -> _Run:
    variables = {"params": params}
    encoded = model.apply(variables, batch.images, plan=plan, method="encode_images")
    prefilled = model.apply(
        variables, jax.tree.map(lambda x: x[:, None], encoded.tokens),
        image_valid=jnp.ones((batch.tokens.shape[0], 1), bool), tokens=batch.tokens,
        text_valid=batch.text_valid, plan=plan, max_new_tokens=0, method="prefill",
    )
    return _Run(prefilled.cuts, num_visual=encoded.tokens.num_tokens)


def chosen_mass(trace: CutTrace, *, plan: DecodePlan) -> np.ndarray:
    """float[B]: Σ of the visual attention values of the heads that count."""
    values = np.sort(trace.visual_attention_value, axis=1)
    heads = min(plan.heads, values.shape[1]) if plan.heads else values.shape[1]
    return values[:, values.shape[1] - heads :].sum(1)


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
    model, path = Meteor(experiment.model), workdir / CALIBRATION_FILE
    calibration = Calibration.load(path)
    names = split_plans(PLANS.value) if PLANS.value else list(experiment.plans)
    plans = resolve_plans(names, library=experiment.plans, calibration=calibration)
    mesh = make_mesh(experiment.train.mesh)
    with jax.set_mesh(mesh):
        params, _ = load_params(experiment, workdir, mesh=mesh)
        records = pipeline.open_sources(experiment.data)
        tokenizer = load_tokenizer(experiment.data.tokenizer, folder=workdir / TOKENIZER_FOLDER)
        batch = calibration_batch(experiment, tokenizer=tokenizer, records=records)
        if RANKS.value or not calibration.ranks:
            ranks = calibrate_ranks(model, params, batch.images, plans=plans)
            calibration = dataclasses.replace(calibration, ranks=ranks)
        calibration = calibrate_plans(
            model, params, plans=plans, batch=batch, calibration=calibration
        )
    calibration.save(path)
    console, shapes = Console(), feature_shapes(model, params)
    console.print(rank_table(calibration, shapes=shapes))
    table = Table("plan", "λ of each cut", title=str(path))
    for name, values in calibration.scales.items():
        table.add_row(name, ", ".join(f"{value:.2f}" for value in values))
    if calibration.scales:
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
