"""Where a plan may prune in the decoder: what a step before each layer does.

    meteor sweep-layers --workdir=runs/small --plans=meteor

Before each layer, alone, half of the visual tokens are kept: those that the text's attention
chooses, or as many at random, three times. The table has the loss of the right answers. Questions
are those of the training split, so that no test question has a say in where a plan prunes.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
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
from meteor_jax.config import ConfigError
from meteor_jax.data.tokenizers import load_tokenizer
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.inference.layout import inference_mesh
from meteor_jax.inference.load import load_params
from meteor_jax.inference.sweep_layers import PruneLayer, asked_batches, measure_prune_layers
from meteor_jax.models.family import build_model
from meteor_jax.pruning.calibration import Calibration


def define_flags() -> None:
    define_config(required=False)
    define_workdir()
    define_plans("meteor", "Their steps before the decoder are run; those in it say how to score.")
    flags.DEFINE_float("share", 0.5, "Of the visual tokens, what is kept: between 0 and 1.")
    flags.DEFINE_integer("num_images", 64, "Images of a source.", lower_bound=1)


def main(options: flags.FlagValues) -> None:
    """Prints a table a plan, with a row a layer."""
    if not 0 < options.share < 1:
        raise ConfigError(f"--share: expected a share between 0 and 1, got {options.share}.")
    workdir = Path(options.workdir)
    experiment = read_config(options, folder=workdir)
    plans = resolve_plans(
        read_plans(options),
        library=experiment.plans,
        calibration=Calibration.load(workdir / CALIBRATION_FILE),
    )
    model, mesh = build_model(experiment.model).module, inference_mesh(experiment)
    with jax.set_mesh(mesh):
        params, _ = load_params(experiment, workdir, mesh=mesh)
        tokenizer = load_tokenizer(experiment.data.tokenizer, folder=workdir / TOKENIZER_FOLDER)
        batches = asked_batches(experiment, tokenizer=tokenizer, num_images=options.num_images)
        for plan in plans:
            unpruned, found = measure_prune_layers(
                model, params, plan=plan, batches=batches, share=options.share
            )
            Console().print(
                layer_table(found, name=plan.name, unpruned=unpruned, share=options.share)
            )


def layer_table(found: list[PruneLayer], *, name: str, unpruned: float, share: float) -> Table:
    """One row a layer; losses in nats a token."""
    table = Table(
        "pruned before",
        "by attention",
        "at random",
        "overlap",
        "VAV",
        title=f"plan '{name}': the answers' loss, nats a token",
        caption=f"{unpruned:.3f} unpruned; {share:.0%} of the tokens kept; overlap: tokens kept "
        "by attention, whichever of two questions is asked; VAV: mean, 5 % and 95 %",
    )
    for row in found:
        mean, low, high = row.value
        chance = row.losses_by_chance
        table.add_row(
            f"layer {row.layer}",
            f"{row.loss:.3f}",
            f"{np.mean(chance):.3f} ({min(chance):.3f}–{max(chance):.3f})",
            f"{row.same:.0%}",
            f"{mean:.2f} ({low:.2f}–{high:.2f})",
        )
    return table
