"""Evaluates a checkpoint: `python evaluate.py --checkpoint=runs/tiny --plans=full,meteor`.

docs/evaluate.md says what it reads and writes.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from meteor_jax.checkpoint import CheckpointError
from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.evaluation.request import check_request
from meteor_jax.experiment.config import Experiment, load_experiment
from meteor_jax.experiment.flags import parse_flags
from meteor_jax.inference.layout import inference_mesh
from meteor_jax.inference.load import load_params, read_experiment, source_folder
from meteor_jax.parallel.distributed import (
    abort_all_on_error,
    define_process_flags,
    start_from_flags,
)
from meteor_jax.pruning.text import split_plans
from meteor_jax.reports.tables import show_results

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment (default: the one that the checkpoint was trained with).",
    lock_config=True,
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder that results are written to (default: that of the checkpoint)."
)
TASKS = flags.DEFINE_string(
    "tasks", None, "Tasks, groups or sources, with commas between, or 'all' (default: config.eval)."
)
PLANS = flags.DEFINE_string(
    "plans", None, "Plans, as in 'full,fastv(layer=2,keep=64)' (default: config.eval)."
)
NUM_QUESTIONS = flags.DEFINE_integer(
    "num_questions", None, "Questions of each task (default: config.eval)."
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Folder of a run whose checkpoint is evaluated (default: workdir, or config.init_from).",
)
STEP = flags.DEFINE_integer("step", None, "Which of its checkpoints (default: the newest).")
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where the folders of benchmarks are (default: config.data.data_dir)."
)

define_process_flags()


def main(argv: list[str]) -> int:
    """Returns the exit code: 2, after one line, for what the user can put right."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument '{argv[1]}'; flags start with --.")
        start_from_flags()
        evaluate()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def evaluate() -> None:
    """Restores the parameters that the flags name onto inference's mesh and evaluates them.

    Raises:
        ValueError, OSError: one line that says what is wrong and what to do.
    """
    if WORKDIR.value is None and CHECKPOINT.value is None:
        raise CheckpointError("name a run with --checkpoint or --workdir.")
    workdir = Path(WORKDIR.value or CHECKPOINT.value)
    experiment = find_experiment(Path(CHECKPOINT.value or workdir))
    folder, init_from = source_folder(experiment, workdir)
    if CHECKPOINT.value is not None:
        folder, init_from = Path(CHECKPOINT.value), ()
    if not folder.is_dir():
        raise FileNotFoundError(f"workdir {folder} does not exist: train first, or correct it.")
    request = {
        "tasks": TASKS.value and [name.strip() for name in TASKS.value.split(",") if name.strip()],
        "plans": PLANS.value and split_plans(PLANS.value),
        "num_questions": NUM_QUESTIONS.value,
    }
    check_request(experiment, source_dir=folder, **request)
    mesh = inference_mesh(experiment)
    with jax.set_mesh(mesh), abort_all_on_error():
        params, step = load_params(
            experiment, folder, mesh=mesh, step=STEP.value, init_from=init_from
        )
        rows = evaluate_checkpoint(
            experiment, params, workdir=workdir, source_dir=folder, step=step, **request
        )
        show_results(rows, workdir=workdir)


def find_experiment(folder: Path) -> Experiment:
    """That of --config, else the folder's own, with --data_dir put in."""
    if CONFIG.value is not None:
        experiment = load_experiment(CONFIG.value)
    else:
        experiment = read_experiment(folder)
    if DATA_DIR.value is not None:
        data = dataclasses.replace(experiment.data, data_dir=DATA_DIR.value)
        experiment = dataclasses.replace(experiment, data=data)
    return experiment


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
