"""Evaluates a checkpoint: `python evaluate.py --config=configs/tiny.py --workdir=runs/tiny`."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from meteor_jax.checkpoint import FOLDER, CheckpointError, restore_params, restore_parts
from meteor_jax.evaluation.config import check_request
from meteor_jax.evaluation.runner import evaluate_checkpoint, param_shapes
from meteor_jax.parallel import make_mesh
from meteor_jax.pruning.baselines import split_plans
from meteor_jax.training.experiment import Experiment, load_experiment, parse_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; results are written there.")
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
    "checkpoint", None,
    "Folder of a run whose checkpoint is evaluated (default: workdir, or config.init_from).",
)


def main(argv: list[str]) -> int:
    """Returns the exit code: 2, after one line, for what the user can put right."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument '{argv[1]}'; flags start with --.")
        evaluate(load_experiment(CONFIG.value))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def evaluate(experiment: Experiment) -> None:
    """Restores the parameters onto the config's mesh and evaluates them.

    Raises:
        ValueError, OSError: one line that says what is wrong and what to do.
    """
    workdir = Path(WORKDIR.value)
    source_dir = Path(CHECKPOINT.value or workdir)
    init_from = ()
    if CHECKPOINT.value is None and not (workdir / FOLDER).is_dir():
        init_from = experiment.init_from
        source_dir = Path(init_from[0]) if init_from else workdir
    tasks = None
    if TASKS.value is not None:
        tasks = [name.strip() for name in TASKS.value.split(",") if name.strip()]
    request = {
        "tasks": tasks,
        "plans": None if PLANS.value is None else split_plans(PLANS.value),
        "num_questions": NUM_QUESTIONS.value,
    }
    if not source_dir.is_dir():
        raise FileNotFoundError(f"workdir {source_dir} does not exist: train first, or correct it.")
    check_request(experiment, source_dir=source_dir, **request)
    mesh = make_mesh(experiment.train.mesh)
    with jax.set_mesh(mesh):
        like = param_shapes(experiment, mesh=mesh)
        if init_from:
            params = restore_parts(init_from, like)
            if missing := sorted(like.keys() - params.keys()):
                raise CheckpointError(f"init_from: nothing there holds {', '.join(missing)}.")
        else:
            params = restore_params(source_dir, like)
        evaluate_checkpoint(
            experiment, params, workdir=workdir, source_dir=source_dir, **request
        )


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
