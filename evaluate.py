"""Evaluates a checkpoint: `python evaluate.py --config=configs/tiny.py --workdir=runs/tiny`."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from meteor_jax.checkpoint import restore_params
from meteor_jax.config import ConfigError
from meteor_jax.evaluation.answering import init_shapes
from meteor_jax.evaluation.runner import evaluate_checkpoint
from meteor_jax.evaluation.tasks import split_names
from meteor_jax.training.experiment import load_experiment, parse_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; results are written there.")
TASKS = flags.DEFINE_string(
    "tasks", None, "Tasks, groups or sources, with commas between, or 'all' (default: config.eval)."
)
PLANS = flags.DEFINE_string(
    "plans", None, "Plans, with commas between: 'full,fastv(layer=2,keep=64)' (default: config.eval)."
)
NUM_QUESTIONS = flags.DEFINE_integer(
    "num_questions", None, "Questions of each task (default: config.eval)."
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Folder of another run, whose checkpoint is evaluated (default: workdir)."
)
