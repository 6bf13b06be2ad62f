"""Trains a model through the stages of its config, and evaluates it.

    meteor train --config=configs/tiny.py --workdir=runs/tiny

Any field of the config can be set: `--config.train.finetune.steps=100`. The same command goes on
where a run was interrupted, on as many processes and devices as there are then. On a TPU pod or
under SLURM every process is given this command; elsewhere --coordinator, --num_processes and
--process_id say which one it is. `python train.py` is the same command.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from absl import flags, logging

from meteor_jax.checkpoint import CALIBRATION_FILE
from meteor_jax.cli.flags import (
    config_document,
    define_config,
    define_processes,
    define_workdir,
    read_config,
    start,
)
from meteor_jax.cli.run import fail
from meteor_jax.config import ConfigError
from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.evaluation.request import check_request
from meteor_jax.evaluation.results import averages
from meteor_jax.experiment.config import Experiment
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.inference.calibrate import (
    CalibrationBatch,
    calibrate_plans,
    calibration_batch,
    needs_measuring,
)
from meteor_jax.inference.engine.predictor import check_fits
from meteor_jax.inference.layout import during_training, inference_mesh, param_shapes
from meteor_jax.inference.ranks import calibrate_ranks, feature_shapes, full_rank_warnings
from meteor_jax.models.family import build_model
from meteor_jax.parallel.distributed import DataShard, is_main_process, wait_for_processes
from meteor_jax.parallel.mesh import make_mesh
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.reports.tables import show_results
from meteor_jax.training.data import TrainingData, open_training_data
from meteor_jax.training.init import placeholder_ranks
from meteor_jax.training.logging.profiling import parse_range
from meteor_jax.training.logging.recorder import TrainingFailed
from meteor_jax.training.loop import train


def define_flags() -> None:
    define_config()
    define_workdir("Folder of the run: everything is written there.")
    flags.DEFINE_string(
        "profile", None, "FIRST:LAST: trace these steps into workdir/profile, for TensorBoard."
    )
    define_processes()


def main(options: flags.FlagValues) -> int:
    """Returns the exit code: 0, 2 for what the user can put right, 1 for a loss that is NaN or
    infinite or data of which nothing can be used, 128 + n for a run that signal n ended after it
    was saved."""
    experiment, workdir = read_config(options), Path(options.workdir)
    profile = parse_range(options.profile) if options.profile else range(0)
    check_request(experiment, source_dir=workdir)
    start(options, enable_preemption=True)
    data = open_training_data(experiment, workdir=workdir)
    check_run(experiment, data)
    try:
        result = train(
            experiment,
            model=build_model(experiment.model),
            data=data,
            workdir=workdir,
            config=config_document(options),
            evaluate=functools.partial(evaluate, experiment, data, workdir=workdir),
            calibrate=functools.partial(calibrate, experiment, data),
            profile=profile,
        )
    except ConfigError:
        raise
    except TrainingFailed as error:
        return fail(error, code=1)
    except (ValueError, OSError) as error:  # nothing that one line could explain
        raise RuntimeError("training ended at an error") from error
    return 0 if result.signal is None else 128 + result.signal


def check_run(experiment: Experiment, data: TrainingData) -> None:
    """Meets before the first step what would only be met by a later stage, or at the end.

    Raises:
        ConfigError: data that a stage or a calibration cannot have, a plan that does not fit where
            it is evaluated, or a mesh that does not fit the devices.
    """
    model, stages = build_model(experiment.model), experiment.train.stages()
    for stage in stages:
        try:
            data.batches(stage, first_batch=0, shard=DataShard())
        except ValueError as error:
            raise ConfigError(f"train.{stage.name}: {error}") from error
    shapes = param_shapes(experiment, mesh=make_mesh(experiment.train.mesh))
    inference_mesh(experiment)
    asked = {"eval.plans": experiment.eval.plans}
    if experiment.train.eval_every:  # on the way a stage's own plans are evaluated
        asked |= {f"train.{stage.name}.plans": stage.config.plans for stage in stages}
    evaluated: list[PrunePlan] = []
    for where, names in asked.items():
        plans = _plans(experiment, names)
        evaluated += plans
        for plan in _plans(experiment, names, placeholder_ranks(model, plans=plans)):
            try:
                check_fits(model, shapes, plan=plan)
            except ValueError as error:
                raise ConfigError(f"{where}: plan '{plan.name}': {error}") from error
    calibrates = any(stage.config.calibrate_before for stage in stages)
    if calibrates or needs_measuring(evaluated, Calibration()):
        _calibration_batch(experiment, data)


def calibrate(experiment: Experiment, data: TrainingData, params: Any) -> Calibration:
    """Feature ranks for a stage that is about to begin."""
    model = build_model(experiment.model).module
    asked = [*(stage.config.plans for stage in experiment.train.stages()), experiment.eval.plans]
    plans = [plan for names in asked for plan in _plans(experiment, names)]
    images = _calibration_batch(experiment, data).images
    calibration = Calibration(ranks=calibrate_ranks(model, params, images, plans=plans))
    _warn_of_full_ranks(model, params, plans, calibration)
    return calibration


def evaluate(
    experiment: Experiment,
    data: TrainingData,
    params: Any,
    *,
    workdir: Path,
    step: int,
    final: bool,
) -> dict[str, float]:
    """Everything in config.eval at the end; on the way few questions, as the stage trains.

    `params` are cast and moved once to where inference holds them: asked where they are trained,
    every token of every answer would gather them.
    """
    settings, plans = experiment.train, experiment.eval.plans
    if not final:
        plans = tuple(dict.fromkeys(settings.stage_at(step).config.plans))
    params, mesh = during_training(params, experiment, mesh=jax.sharding.get_mesh())
    with jax.set_mesh(mesh):
        _measure_missing(experiment, data, params, plans=plans, workdir=workdir)
        rows = evaluate_checkpoint(
            experiment,
            params,
            workdir=workdir,
            plans=plans,
            step=step,
            num_questions=None if final else settings.eval_questions,
            display="bar" if final else "quiet",
        )
    if final:
        show_results(rows, workdir=workdir)
    return {
        f"{plan}/{group}": score
        for plan, groups in averages(rows).items()
        for group, score in groups.items()
    }


def _measure_missing(
    experiment: Experiment,
    data: TrainingData,
    params: Any,
    *,
    plans: Sequence[str],
    workdir: Path,
) -> None:
    """Measures what `plans` need and calibration.json does not have yet."""
    path, model = workdir / CALIBRATION_FILE, build_model(experiment.model).module
    before = Calibration.load(path)
    to_measure = _plans(experiment, plans, before)
    if not needs_measuring(to_measure, before):
        return
    calibration = calibrate_plans(
        model,
        params,
        batch=_calibration_batch(experiment, data),
        calibration=before,
        plans=to_measure,
        batch_size=experiment.eval.batch_size,
    )
    if calibration.ranks != before.ranks:
        _warn_of_full_ranks(model, params, to_measure, calibration)
    if is_main_process():
        calibration.save(path)
    wait_for_processes("calibrated")


def _plans(
    experiment: Experiment, names: Sequence[str], calibration: Calibration | None = None
) -> tuple[PrunePlan, ...]:
    names = tuple(dict.fromkeys(names))  # a stage may name a plan again, to train it more often
    return resolve_plans(names, library=experiment.plans, calibration=calibration or Calibration())


def _calibration_batch(experiment: Experiment, data: TrainingData) -> CalibrationBatch:
    return calibration_batch(experiment, tokenizer=data.tokenizer, records=data.records)


def _warn_of_full_ranks(
    model: nn.Module, params: Any, plans: Sequence[PrunePlan], calibration: Calibration
) -> None:
    shapes = feature_shapes(model, params)
    for line in full_rank_warnings(plans, calibration=calibration, shapes=shapes):
        if is_main_process():
            logging.warning("%s", line)
