"""Scores a checkpoint under plans: answers, accuracy, tokens and time.

    meteor evaluate --checkpoint=runs/tiny --plans=full,meteor
    meteor evaluate --checkpoint=runs/tiny --data_dir=~/benchmarks --tasks=paper11

docs/evaluate.md says what it reads and writes. `python evaluate.py` is the same command.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import flags

from meteor_jax.checkpoint import CheckpointError
from meteor_jax.cli.flags import (
    define_config,
    define_plans,
    define_processes,
    define_workdir,
    read_config,
    read_plans,
    start,
)
from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.evaluation.request import check_request
from meteor_jax.experiment.config import Experiment
from meteor_jax.inference.layout import inference_mesh
from meteor_jax.inference.load import load_params, source_folder
from meteor_jax.parallel.distributed import abort_all_on_error
from meteor_jax.reports.tables import show_results


def define_flags() -> None:
    define_config(required=False)
    define_workdir(
        "Folder that results are written to. Default: that of the checkpoint.", required=False
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Folder of a run or of converted weights. Default: workdir, or config.init_from.",
    )
    flags.DEFINE_integer("step", None, "Which of its checkpoints. Default: the newest.")
    flags.DEFINE_string(
        "tasks",
        None,
        "Tasks, groups or sources, or all, separated by commas. Default: config.eval.",
    )
    define_plans(None, "Default: config.eval.")
    flags.DEFINE_integer(
        "num_questions", None, "Questions of each task. Default: config.eval.", lower_bound=1
    )
    flags.DEFINE_string(
        "data_dir", None, "Where the folders of benchmarks are. Default: config.data.data_dir."
    )
    define_processes()


def main(options: flags.FlagValues) -> None:
    """Restores the parameters that the flags name onto inference's mesh and evaluates them."""
    start(options)
    if options.workdir is None and options.checkpoint is None:
        raise CheckpointError("name a run with --checkpoint or --workdir.")
    workdir = Path(options.workdir or options.checkpoint)
    experiment = find_experiment(options, folder=Path(options.checkpoint or workdir))
    folder, init_from = source_folder(experiment, workdir)
    if options.checkpoint is not None:
        folder, init_from = Path(options.checkpoint), ()
    if not folder.is_dir():
        raise FileNotFoundError(f"workdir {folder} does not exist: train first, or correct it.")
    names = (name.strip() for name in (options.tasks or "").split(","))
    request: dict[str, Any] = {
        "tasks": [name for name in names if name] or None,
        "plans": read_plans(options) or None,
        "num_questions": options.num_questions,
    }
    check_request(experiment, source_dir=folder, **request)
    mesh = inference_mesh(experiment)
    with jax.set_mesh(mesh), abort_all_on_error():
        params, step = load_params(
            experiment, folder, mesh=mesh, step=options.step, init_from=init_from
        )
        rows = evaluate_checkpoint(
            experiment, params, workdir=workdir, source_dir=folder, step=step, **request
        )
        show_results(rows, workdir=workdir)


def find_experiment(options: flags.FlagValues, *, folder: Path) -> Experiment:
    """That of --config, else the folder's own, with --data_dir put in."""
    experiment = read_config(options, folder=folder)
    if options.data_dir is not None:
        data = dataclasses.replace(experiment.data, data_dir=options.data_dir)
        experiment = dataclasses.replace(experiment, data=data)
    return experiment
