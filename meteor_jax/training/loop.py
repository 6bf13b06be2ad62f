"""The training loop: evaluate, checkpoint, step; stage after stage; resumed wherever it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from meteor_jax import checkpoint
from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import Experiment, Stage
from meteor_jax.models.family import Family
from meteor_jax.parallel.chips import find_chip
from meteor_jax.parallel.distributed import (
    DataShard,
    abort_all_on_error,
    is_main_process,
    row_shard,
    wait_for_processes,
)
from meteor_jax.parallel.mesh import make_mesh
from meteor_jax.parallel.rules import shard_batch
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.training.checkpoint_compat import resumed_stage
from meteor_jax.training.flops import train_step_flops
from meteor_jax.training.held_out import HeldOutLoss
from meteor_jax.training.init import (
    check_stage,
    init_or_restore_state,
    make_steps,
    reinit_params,
    training_plans,
)
from meteor_jax.training.logging.metrics import MetricsLog
from meteor_jax.training.logging.profiling import StepProfiler
from meteor_jax.training.logging.progress import ProgressBar
from meteor_jax.training.logging.recorder import StepRecorder, TrainingFailed
from meteor_jax.training.optimizer import make_optimizer
from meteor_jax.training.preemption import Interrupted, StopSignals
from meteor_jax.training.state import TrainState, start_stage
from meteor_jax.types import Batch


class Data(Protocol):
    """Batches of NumPy arrays, a shard's rows; see `training.data.TrainingData`."""

    def batches(self, stage: Stage, *, first_batch: int, shard: DataShard) -> Iterator[Batch]: ...

    def held_out(self, stage: Stage, *, shard: DataShard) -> Sequence[Batch]: ...


class Evaluate(Protocol):
    """Scores by name, for parameters after `step` steps; `final` at the end of the run."""

    def __call__(self, params: Any, *, step: int, final: bool) -> Mapping[str, float]: ...


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The last state, and the signal that ended the run early, if one did."""

    state: TrainState
    signal: int | None = None


def train(
    experiment: Experiment,
    *,
    model: Family,
    data: Data,
    workdir: Path,
    config: Mapping[str, Any],
    evaluate: Evaluate | None = None,
    calibrate: Callable[[Any], Calibration] | None = None,
    profile: range = range(0),
    devices: Sequence[jax.Device] | None = None,
) -> TrainResult:
    """Trains through all stages, or on from the newest checkpoint in `workdir`.

    With many processes each of them calls this with the same arguments.

    SIGINT and SIGTERM let the step finish, save and end the run; a second one kills it.

    Args:
        config: recorded in the checkpoints.
        evaluate: called every `eval_every` steps and at the end.
        calibrate: given the parameters, measures the ranks that `calibrate_before` asks for.
        profile: steps to trace into `workdir`/profile.
        devices: to train on; all by default.

    Raises:
        ConfigError: for what the config asks and cannot be had.
        TrainingFailed: if the loss is NaN or infinite, naming the step and its examples.
    """
    settings, workdir = experiment.train, Path(workdir)
    mesh = make_mesh(settings.mesh, devices=devices)
    shard = row_shard(mesh)
    stages = settings.stages()
    for stage in stages:
        check_stage(stage, experiment, mesh=mesh, can_calibrate=calibrate is not None)
    chip = find_chip(mesh.devices.flat[0].device_kind)
    workdir.mkdir(parents=True, exist_ok=True)

    state: Any = None  # a `TrainState` once the first stage begins
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        saved = stack.enter_context(checkpoint.open_checkpoints(workdir, keep=settings.max_to_keep))
        first_step = step = saved.latest_step() or 0
        resumed = None
        if saved.latest_step() is not None:
            resumed = resumed_stage(
                checkpoint.read_config(saved, first_step),
                experiment,
                step=first_step,
                workdir=workdir,
            )
        log = stack.enter_context(MetricsLog(workdir, first_step=first_step))
        bar = stack.enter_context(ProgressBar(total=stages[-1].stop, first_step=first_step))
        profiler = stack.enter_context(StepProfiler(workdir, steps=profile))
        stop = stack.enter_context(StopSignals())
        stack.enter_context(abort_all_on_error(alike=(ConfigError, TrainingFailed)))
        recorder = StepRecorder(
            log, bar, peak_flops_per_s=chip.flops_per_s * mesh.devices.size if chip else None
        )

        def trained_params() -> Any:
            return state.params if state.ema is None else state.ema

        def save() -> None:
            recorder.flush()
            checkpoint.save(saved, state, step=step, config=config)
            recorder.restart_clock()

        def run_evaluation(evaluate: Evaluate, *, final: bool) -> None:
            recorder.flush()
            with stop.at_once(step), bar.paused():
                scores = evaluate(trained_params(), step=step, final=final)
            log.write_scalars({f"eval/{name}": score for name, score in scores.items()}, step=step)
            if not final:
                shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
                bar.say(f"evaluated after step {step}: {shown}")
            recorder.restart_clock()

        try:
            for stage in stages:
                if stage.stop <= first_step and stage.name != resumed and stage is not stages[-1]:
                    continue
                is_new = state is not None or step == 0  # and was not begun before
                optimizer = make_optimizer(stage.config)
                batches = data.batches(stage, first_batch=max(step - stage.start, 0), shard=shard)
                batch = next(batches)
                batches = itertools.chain([batch], batches)
                shapes = _whole_batch(batch, shard)
                if state is None:
                    state = init_or_restore_state(
                        experiment,
                        model=model,
                        stage=stage,
                        optimizer=optimizer,
                        batch=shapes,
                        mesh=mesh,
                        saved=saved,
                        calibration=_load_calibration(workdir),
                    )
                    checkpoint.write_config(workdir, config)
                    if experiment.init_from and not first_step:
                        bar.say(f"parameters from {', '.join(experiment.init_from)}")
                    if first_step:
                        bar.say(f"resumed at step {first_step} of {stages[-1].stop} in {workdir}")
                else:
                    state = start_stage(
                        state,
                        optimizer=optimizer,
                        trainable=stage.config.trainable,
                        mesh=mesh,
                        rules=model.sharding_rules,
                    )
                # A checkpoint at the very beginning of a stage was written after this.
                if is_new and stage.config.reinit:
                    patterns = ", ".join(stage.config.reinit)
                    bar.say(f"{stage.name}: re-initialised parameters matching {patterns}")
                    state = reinit_params(
                        state,
                        patterns=stage.config.reinit,
                        model=model,
                        batch=shapes,
                        seed=experiment.seed,
                    )
                if is_new and stage.config.calibrate_before:
                    assert calibrate is not None  # `check_stage`
                    calibration = calibrate(state.params)
                    if is_main_process():
                        calibration.save(workdir / checkpoint.CALIBRATION_FILE)
                    wait_for_processes("calibrated")
                plans = training_plans(experiment, stage, _load_calibration(workdir))
                steps = make_steps(
                    experiment,
                    plans,
                    model=model,
                    stage=stage,
                    optimizer=optimizer,
                    state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
                )
                flops = {
                    name: train_step_flops(run_step, state, shapes)
                    for name, run_step in steps.items()
                }
                held_out = None
                if settings.held_out_every:
                    held_out = HeldOutLoss(model, plans, data.held_out(stage, shard=shard), mesh)
                recorder.restart_clock()
                while step < stage.stop:
                    if step > first_step:
                        if evaluate and _is_due(step, settings.eval_every):
                            run_evaluation(evaluate, final=False)
                        if _is_due(step, settings.checkpoint_every):
                            save()
                    stop.check(step)
                    profiler.before(step)
                    started = time.perf_counter()
                    batch = next(batches)
                    waited = time.perf_counter() - started
                    plan = stage.plan_name(step)
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, metrics = steps[plan](state, shard_batch(batch, mesh))
                    row = {
                        "step": step,
                        "stage": stage.name,
                        "plan": plan,
                        "examples": stage.config.batch_size,
                        "data_wait_s": waited,
                    }
                    recorder.add(metrics, row=row, example_id=batch.example_id, flops=flops[plan])
                    profiler.after(step, metrics)
                    step += 1
                    if held_out and (_is_due(step, settings.held_out_every) or step == stage.stop):
                        recorder.flush(after=functools.partial(held_out, trained_params()))
                    elif step % settings.log_every == 0:
                        recorder.flush()
            save()
            if recorder.num_skipped:
                bar.say(f"{recorder.num_skipped} examples were skipped; each was named above")
            if evaluate:
                run_evaluation(evaluate, final=True)
            saved.wait_until_finished()
            return TrainResult(state)
        except Interrupted:
            save()
            saved.wait_until_finished()
            bar.say(
                f"stopped by {stop.name} after step {step} of {stages[-1].stop} and saved; the "
                f"same command goes on from there"
            )
            return TrainResult(state, signal=stop.number)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _load_calibration(workdir: Path) -> Calibration:
    return Calibration.load(workdir / checkpoint.CALIBRATION_FILE)


def _whole_batch(batch: Batch, shard: DataShard) -> Batch:
    """The shapes of all processes' rows together."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] * shard.count, *x.shape[1:]), x.dtype), batch
    )
