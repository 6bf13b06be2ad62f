"""Measures what plans need offline, feature ranks and λ, and writes WORKDIR/calibration.json.

    meteor calibrate --workdir=runs/tiny
    meteor calibrate --workdir=runs/tiny --plans='meteor,meteor(decode.keep=(40,30,20))'

Training does the same: ranks before the stage that asks for them, λ before each evaluation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from meteor_jax.checkpoint import CALIBRATION_FILE, TOKENIZER_FOLDER
from meteor_jax.cli.flags import (
    define_config,
    define_plans,
    define_workdir,
    read_config,
    read_plans,
)
from meteor_jax.data import pipeline
from meteor_jax.data.tokenizers import load_tokenizer
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.inference.calibrate import calibrate_plans, calibration_batch
from meteor_jax.inference.layout import inference_mesh
from meteor_jax.inference.load import load_params
from meteor_jax.inference.ranks import calibrate_ranks, feature_shapes, full_rank_warnings
from meteor_jax.models.family import build_model
from meteor_jax.pruning.budgets import Adaptive
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.points import NUM_SEGMENTS


def define_flags() -> None:
    define_config(required=False)
    define_workdir()
    define_plans(None, "Default: all of config.plans.")
    flags.DEFINE_bool("ranks", False, "Measure the ranks again that the run was trained with.")


def main(options: flags.FlagValues) -> None:
    """Measures with the newest checkpoint, and prints what is written."""
    workdir = Path(options.workdir)
    experiment = read_config(options, folder=workdir)
    model, path = build_model(experiment.model).module, workdir / CALIBRATION_FILE
    calibration = Calibration.load(path)
    names = read_plans(options) or list(experiment.plans)
    plans = resolve_plans(names, library=experiment.plans, calibration=calibration)
    mesh = inference_mesh(experiment)
    with jax.set_mesh(mesh):
        params, _ = load_params(experiment, workdir, mesh=mesh)
        records = pipeline.open_sources(experiment.data)
        tokenizer = load_tokenizer(experiment.data.tokenizer, folder=workdir / TOKENIZER_FOLDER)
        batch = calibration_batch(experiment, tokenizer=tokenizer, records=records)
        if options.ranks or not calibration.ranks:
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
