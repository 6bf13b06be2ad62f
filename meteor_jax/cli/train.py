"""Trains a model through the stages of its config, and evaluates it.

    meteor train --config=configs/tiny.py --workdir=runs/tiny

Any field of the config can be set: `--config.train.finetune.steps=100`. The same command goes on
where a run was interrupted, on as many processes and devices as there are then. On a TPU pod or
under SLURM every process is given this command; elsewhere --coordinator, --num_processes and
--process_id say which one it is. `python train.py` is the same command.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

from meteor_jax.checkpoint import CALIBRATION_FILE, TOKENIZER_FOLDER, parts_in
from meteor_jax.cli.flags import (
    define_config,
    define_processes,
    define_workdir,
    read_config,
    start,
)
from meteor_jax.cli.run import fail
from meteor_jax.config import ConfigError
from meteor_jax.data import pipeline
from meteor_jax.data.tokenizers import Tokenizer, load_tokenizer
from meteor_jax.evaluation.evaluator import evaluate_checkpoint
from meteor_jax.evaluation.request import check_request
from meteor_jax.evaluation.results import averages
from meteor_jax.experiment.config import Experiment, Stage
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
from meteor_jax.models.family import Family, build_model
from meteor_jax.parallel.distributed import (
    DataShard,
    is_main_process,
    main_process_first,
    wait_for_processes,
)
from meteor_jax.parallel.mesh import make_mesh
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.reports.tables import show_results
from meteor_jax.training.init import placeholder_ranks
from meteor_jax.training.logging.profiling import parse_range
from meteor_jax.training.logging.recorder import TrainingFailed
from meteor_jax.training.loop import train
from meteor_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop calls back: data by stage, calibration, evaluation."""

    experiment: Experiment
    workdir: Path
    model: Family
    tokenizer: Tokenizer
    records: Sequence[Sequence[Any]]

    def check(self) -> None:
        """Meets before the first step what would only be met by a later stage, or at the end.

        Raises:
            ConfigError: data that a stage or a calibration cannot have, a plan that does not fit
                where it is evaluated, or a mesh that does not fit the devices.
        """
        experiment = self.experiment
        for stage in experiment.train.stages():
            try:
                self.batches(stage, first_batch=0, shard=DataShard())
            except ValueError as error:
                raise ConfigError(f"train.{stage.name}: {error}") from error
        shapes = param_shapes(experiment, mesh=make_mesh(experiment.train.mesh))
        inference_mesh(experiment)
        asked = {"eval.plans": experiment.eval.plans}
        if experiment.train.eval_every:  # on the way a stage's own plans are evaluated
            asked |= {
                f"train.{stage.name}.plans": stage.config.plans
                for stage in experiment.train.stages()
            }
        for where, names in asked.items():
            plans = self._plans(names, Calibration())
            for plan in self._plans(names, placeholder_ranks(self.model, plans=plans)):
                try:
                    check_fits(self.model, shapes, plan=plan)
                except ValueError as error:
                    raise ConfigError(f"{where}: plan '{plan.name}': {error}") from error
        nothing = Calibration()
        plans = [plan for names in asked.values() for plan in self._plans(names, nothing)]
        asked_for = any(stage.config.calibrate_before for stage in experiment.train.stages())
        if asked_for or needs_measuring(plans, nothing):
            self.calibration_batch()

    def batches(self, stage: Stage, *, first_batch: int, shard: DataShard) -> Iterator[Batch]:
        rows = self._rows(stage, shard)
        # What is held out stays the same from seed to seed.
        rows["config"] = dataclasses.replace(
            rows["config"], seed=rows["config"].seed + self.experiment.seed
        )
        return pipeline.make_train_iterator(start_batch=first_batch, **rows)

    def held_out(self, stage: Stage, *, shard: DataShard) -> Sequence[Batch]:
        batches = pipeline.make_held_out_batches(**self._rows(stage, shard))
        return batches[: self.experiment.train.held_out_batches]

    def _rows(self, stage: Stage, shard: DataShard) -> dict[str, Any]:
        config, data = stage.config, self.experiment.data
        if config.text_length:
            data = dataclasses.replace(data, text_length=config.text_length)
        return {
            "config": data,
            "tokenizer": self.tokenizer,
            "task": config.task,
            "template": config.template,
            "records": self.records,
            "batch_size": config.batch_size // shard.count,
            "process_index": shard.index,
            "process_count": shard.count,
        }

    def calibration_batch(self) -> CalibrationBatch:
        return calibration_batch(self.experiment, tokenizer=self.tokenizer, records=self.records)

    def calibrate(self, params: Any) -> Calibration:
        """Feature ranks for a stage that is about to begin."""
        asked = [stage.config.plans for stage in self.experiment.train.stages()]
        asked.append(self.experiment.eval.plans)
        plans = [plan for names in asked for plan in self._plans(names, Calibration())]
        images = self.calibration_batch().images
        calibration = Calibration(
            ranks=calibrate_ranks(self.model.module, params, images, plans=plans)
        )
        self._warn_of_full_ranks(params, plans, calibration)
        return calibration

    def _warn_of_full_ranks(
        self, params: Any, plans: Sequence[PrunePlan], calibration: Calibration
    ) -> None:
        shapes = feature_shapes(self.model.module, params)
        for line in full_rank_warnings(plans, calibration=calibration, shapes=shapes):
            if is_main_process():
                logging.warning("%s", line)

    def _plans(self, names: Sequence[str], calibration: Calibration) -> tuple[PrunePlan, ...]:
        names = tuple(dict.fromkeys(names))  # a stage may name a plan again, to train it more often
        return resolve_plans(names, library=self.experiment.plans, calibration=calibration)

    def evaluate(self, params: Any, *, step: int, final: bool) -> dict[str, float]:
        """Everything in config.eval at the end; on the way few questions, as the stage trains.

        `params` are cast and moved once to where inference holds them: asked where they are
        trained, every token of every answer would gather them.
        """
        params, mesh = during_training(params, self.experiment, mesh=jax.sharding.get_mesh())
        with jax.set_mesh(mesh):
            return self._evaluate(params, step=step, final=final)

    def _evaluate(self, params: Any, *, step: int, final: bool) -> dict[str, float]:
        train_config, path = self.experiment.train, self.workdir / CALIBRATION_FILE
        plans = self.experiment.eval.plans
        if not final:
            plans = tuple(dict.fromkeys(train_config.stage_at(step).config.plans))
        calibration = Calibration.load(path)
        to_measure = self._plans(plans, calibration)
        if needs_measuring(to_measure, calibration):
            before = calibration
            calibration = calibrate_plans(
                self.model.module,
                params,
                batch=self.calibration_batch(),
                calibration=calibration,
                plans=to_measure,
                batch_size=self.experiment.eval.batch_size,
            )
            if calibration.ranks != before.ranks:
                self._warn_of_full_ranks(params, to_measure, calibration)
            if is_main_process():
                calibration.save(path)
            wait_for_processes("calibrated")
        rows = evaluate_checkpoint(
            self.experiment,
            params,
            workdir=self.workdir,
            plans=plans,
            step=step,
            num_questions=None if final else train_config.eval_questions,
            display="bar" if final else "quiet",
        )
        if final:
            show_results(rows, workdir=self.workdir)
        return {
            f"{plan}/{group}": score
            for plan, groups in averages(rows).items()
            for group, score in groups.items()
        }


def define_flags() -> None:
    define_config()
    define_workdir("Folder of the run: everything is written there.")
    flags.DEFINE_string(
        "profile", None, "FIRST:LAST: trace these steps into workdir/profile, for TensorBoard."
    )
    define_processes()


def main(options: flags.FlagValues) -> int:
    """Returns the exit code: 0, 2 for what the user can put right, 1 for a loss that is no
    number or data of which nothing can be used, 128 + n for a run that signal n ended after it was
    saved."""
    experiment, workdir = read_config(options), Path(options.workdir)
    profile = parse_range(options.profile) if options.profile else range(0)
    check_request(experiment, source_dir=workdir)
    start(options, enable_preemption=True)
    run = open_run(experiment, workdir=workdir)
    run.check()
    try:
        result = train(
            experiment,
            model=run.model,
            data=run,
            workdir=workdir,
            config=json.loads(options.config.to_json_best_effort()),
            evaluate=run.evaluate,
            calibrate=run.calibrate,
            profile=profile,
        )
    except ConfigError:
        raise
    except TrainingFailed as error:
        return fail(error, code=1)
    except (ValueError, OSError) as error:  # nothing that one line could explain
        raise RuntimeError("training ended at an error") from error
    return 0 if result.signal is None else 128 + result.signal


def open_run(experiment: Experiment, *, workdir: Path) -> Run:
    """Opens the data, and the tokenizer that stands in `workdir`, is inherited or is trained."""
    model = build_model(experiment.model)
    inherit = [
        Path(source) / TOKENIZER_FOLDER
        for source in experiment.init_from
        if model.tokenizer_part in parts_in(source)
    ]
    with main_process_first("data and tokenizer"):
        records = pipeline.open_sources(experiment.data)
        tokenizer = load_tokenizer(
            experiment.data.tokenizer,
            folder=workdir / TOKENIZER_FOLDER,
            texts=lambda: pipeline.training_texts(records),
            inherit=inherit,
        )
    model.check_data(vocabulary=tokenizer.vocab_size, classes=experiment.data.classes)
    return Run(experiment, workdir, model, tokenizer, records)
