"""The training loop: evaluate, checkpoint, step; stage after stage; resumed wherever it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from meteor_jax import checkpoint
from meteor_jax.config import ConfigError
from meteor_jax.parallel import check_batch_size, make_mesh, parameter_shardings, shard_batch
from meteor_jax.pruning.baselines import parse_plan
from meteor_jax.pruning.encode import RankMode
from meteor_jax.pruning.plan import Calibration, PrunePlan
from meteor_jax.training.experiment import Experiment, Stage
from meteor_jax.training.metrics import MetricsLog, ProgressBar, StepRecorder
from meteor_jax.training.optimizer import check_patterns, make_optimizer
from meteor_jax.training.signals import Interrupted, StopSignals
from meteor_jax.training.state import TrainState, enter_stage, init_params, make_state
from meteor_jax.training.step import TrainStep, make_train_step

CALIBRATION_FILE = "calibration.json"


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
    model: nn.Module,
    open_data: Callable[[Stage], grain.DatasetIterator],
    workdir: Path,
    config: Mapping[str, Any],
    evaluate: Evaluate | None = None,
    calibrate: Callable[[Any], Calibration] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainResult:
    """Trains through all stages, or on from the newest checkpoint in `workdir`.

    SIGINT and SIGTERM let the step finish, save and end the run; a second one kills it.

    Args:
        open_data: for a stage, an endless iterator of this process's rows of `Batch`es of NumPy
            arrays, at its beginning.
        config: recorded in the checkpoints.
        evaluate: called every `eval_every` steps and at the end.
        calibrate: given the parameters, measures what a stage's `before` asks for.
        devices: to train on; all by default.

    Raises:
        ConfigError: for what the config asks and cannot be had.
        TrainingFailed: if the loss is NaN or infinite, naming the step and its examples.
    """
    settings, workdir = experiment.train, Path(workdir)
    mesh = make_mesh(settings.mesh, devices=devices)
    stages = settings.stages()
    for stage in stages:
        _check_stage(stage, experiment, mesh=mesh, can_calibrate=calibrate is not None)
    workdir.mkdir(parents=True, exist_ok=True)

    state = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        saved = stack.enter_context(
            checkpoint.open_checkpoints(workdir, keep=settings.keep_checkpoints)
        )
        first_step = step = saved.latest_step() or 0
        log = stack.enter_context(MetricsLog(workdir, first_step=first_step))
        bar = stack.enter_context(ProgressBar(total=stages[-1].stop, first_step=first_step))
        stop = stack.enter_context(StopSignals())
        recorder = StepRecorder(log, bar)

        def save() -> None:
            recorder.flush()
            checkpoint.save(saved, state, step=step, data=data, config=config)
            recorder.restart_clock()

        def run_evaluation(*, final: bool) -> None:
            recorder.flush()
            params = state.params if state.ema is None else state.ema
            with stop.at_once(), bar.paused():
                scores = evaluate(params, step=step, final=final)
            log.write_scalars({f"eval/{name}": score for name, score in scores.items()}, step=step)
            if not final:
                shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
                bar.say(f"evaluated after step {step}: {shown}")
            recorder.restart_clock()

        try:
            for stage in stages:
                if stage.stop <= first_step and stage is not stages[-1]:
                    continue
                data, optimizer = open_data(stage), make_optimizer(stage.config)
                if state is None:
                    state = _first_state(
                        experiment, model=model, stage=stage, optimizer=optimizer, data=data,
                        mesh=mesh, saved=saved, calibration=_load_calibration(workdir),
                    )
                    checkpoint.write_config(workdir, config)
                    if experiment.init_from and not first_step:
                        bar.say(f"parameters from {', '.join(experiment.init_from)}")
                    if first_step:
                        bar.say(f"resumed at step {first_step} of {stages[-1].stop} in {workdir}")
                else:
                    state = enter_stage(
                        state, optimizer=optimizer, trainable=stage.config.trainable, mesh=mesh
                    )
                # A checkpoint at the very beginning of a stage was written after this.
                if stage.config.before == "calibrate_ranks" and (
                    step == stage.start and (step > first_step or step == 0)
                ):
                    calibrate(state.params).save(workdir / CALIBRATION_FILE)
                steps = _make_steps(
                    experiment, model=model, stage=stage, optimizer=optimizer,
                    calibration=_load_calibration(workdir),
                    state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
                )
                recorder.restart_clock()
                while step < stage.stop:
                    if step > first_step:
                        if evaluate and _is_due(step, settings.eval_every):
                            run_evaluation(final=False)
                        if _is_due(step, settings.checkpoint_every):
                            save()
                    stop.check()
                    started = time.perf_counter()
                    batch = next(data)
                    waited = time.perf_counter() - started
                    plan = stage.plan_name(step)
                    state, metrics = steps[plan](state, shard_batch(batch, mesh))
                    row = {
                        "step": step, "stage": stage.name, "plan": plan,
                        "examples": stage.config.batch_size, "data_wait_s": waited,
                    }
                    recorder.add(metrics, row=row, example_id=batch.example_id)
                    step += 1
                    if step % settings.log_every == 0:
                        recorder.flush()
            save()
            if evaluate:
                run_evaluation(final=True)
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
    return Calibration.load(workdir / CALIBRATION_FILE)


def _check_stage(stage: Stage, experiment: Experiment, *, mesh: Mesh, can_calibrate: bool) -> None:
    config, where = stage.config, f"train.{stage.name}"
    check_batch_size(
        config.batch_size // config.accumulate, mesh, where=f"{where}.batch_size / accumulate"
    )
    for name in config.plans:
        parse_plan(name, library=experiment.plans)
    if config.before == "calibrate_ranks" and not can_calibrate:
        raise ConfigError(f"{where}.before: calibrate_ranks needs a model whose ranks can be had.")


def _first_state(
    experiment: Experiment, *, model: nn.Module, stage: Stage,
    optimizer: optax.GradientTransformation, data: grain.DatasetIterator, mesh: Mesh,
    saved: Any, calibration: Calibration,
) -> TrainState:
    """The state to begin with: from the newest checkpoint, `init_from`'s parameters, or nothing."""
    settings = experiment.train
    beginning = data.get_state()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), next(data))
    data.set_state(beginning)

    def with_params(params: Any) -> TrainState:
        return make_state(
            params, optimizer=optimizer, trainable=stage.config.trainable,
            rng=jax.random.PRNGKey(experiment.seed), use_ema=settings.ema > 0,
        )

    def fresh_params() -> Any:
        batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return init_params(model, batch, seed=experiment.seed)

    like = jax.eval_shape(lambda: with_params(fresh_params()))
    _check_whole_run(
        experiment, model=model, params=like.params, batch=shapes, calibration=calibration
    )
    shardings = parameter_shardings(like, mesh)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        like, shardings,
    )
    if saved.latest_step() is not None:
        return checkpoint.restore(saved, like, data=data)
    restored = checkpoint.restore_parts(experiment.init_from, like.params)

    def begin(restored: dict[str, Any]) -> TrainState:
        # Of the fresh parameters only those are computed that nothing replaces.
        return with_params(fresh_params() | restored)

    return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(restored)


def _check_whole_run(
    experiment: Experiment, *, model: nn.Module, params: Any, batch: Any, calibration: Calibration
) -> None:
    """Meets what is wrong with a later stage (patterns, budgets) before the first one has run."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    for stage in experiment.train.stages():
        where, config = f"train.{stage.name}", stage.config
        check_patterns(config.trainable, paths, where=f"{where}.trainable")
        groups = tuple(pattern for pattern, _ in config.learning_rates_by_path)
        check_patterns(groups, paths, where=f"{where}.learning_rates_by_path")
        if config.before == "calibrate_ranks":  # of any ranks, the budgets are the same
            calibration = Calibration(
                ranks=dict.fromkeys(
                    get_args(RankMode), dict.fromkeys(experiment.model.encoders, (1.0, 1.0, 1.0))
                )
            )
        for name in config.plans:
            plan = _training_plan(name, experiment, calibration)
            try:
                jax.eval_shape(lambda p, b, plan=plan: model.apply({"params": p}, b, plan=plan),
                               params, batch)
            except ValueError as error:
                raise ConfigError(f"{where}: plan '{name}': {error}") from error


def _training_plan(name: str, experiment: Experiment, calibration: Calibration) -> PrunePlan:
    return parse_plan(name, library=experiment.plans).calibrated(calibration).for_training()


def _make_steps(
    experiment: Experiment, *, model: nn.Module, stage: Stage,
    optimizer: optax.GradientTransformation, calibration: Calibration, state_shardings: TrainState,
) -> dict[str, TrainStep]:
    return {
        name: make_train_step(
            model, optimizer=optimizer, plan=_training_plan(name, experiment, calibration),
            stage=stage.config, stage_start=stage.start, encoders=experiment.model.encoders,
            ema_decay=experiment.train.ema, state_shardings=state_shardings,
        )
        for name in stage.config.plans
    }
