"""Before the first step of a run and of each stage: checks, the first state, compiled steps."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from meteor_jax import checkpoint
from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import Experiment, Stage
from meteor_jax.models.family import Family, build_model
from meteor_jax.parallel.mesh import check_batch_size
from meteor_jax.parallel.rules import parameter_shardings, with_shardings
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import parse_plan
from meteor_jax.training.checkpoint_compat import check_model
from meteor_jax.training.optimizer import check_patterns, join_params, split_trainable
from meteor_jax.training.state import TrainState, make_state
from meteor_jax.training.step import TrainStep, make_train_step
from meteor_jax.types import Batch


def placeholder_ranks(model: Family, *, plans: Iterable[PrunePlan]) -> Calibration:
    """Ranks that stand for those that `plans` measure: with any, the budgets are the same."""
    ranks: dict[str, tuple[float, ...]] = dict.fromkeys(model.encoders, (1.0, 1.0, 1.0))
    kinds = (str(kind) for plan in plans for kind in plan.rank_kinds)
    return Calibration(ranks=dict.fromkeys(kinds, ranks))


def check_stage(stage: Stage, experiment: Experiment, *, mesh: Mesh, can_calibrate: bool) -> None:
    """Raises ConfigError for what can be seen of a stage before there is a model."""
    config, where = stage.config, f"train.{stage.name}"
    check_batch_size(
        config.batch_size // config.grad_accum_steps,
        mesh,
        where=f"{where}.batch_size / grad_accum_steps",
    )
    for name in config.plans:
        parse_plan(name, library=experiment.plans)
    if config.calibrate_before and not can_calibrate:
        raise ConfigError(f"{where}.calibrate_before: this model has no feature ranks to measure.")


def init_or_restore_state(
    experiment: Experiment,
    *,
    model: Family,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    mesh: Mesh,
    saved: ocp.CheckpointManager,
    calibration: Calibration,
) -> TrainState:
    """The state to begin with: from the newest checkpoint, `init_from`'s parameters, or nothing.

    Args:
        batch: shapes of a whole batch, all processes' rows together.

    Raises:
        ConfigError: what is wrong with any stage, or a checkpoint that does not fit.
    """

    def with_params(params: Any) -> TrainState:
        return make_state(
            params,
            optimizer=optimizer,
            trainable=stage.config.trainable,
            rng=jax.random.PRNGKey(experiment.seed),
            use_ema=experiment.train.ema_decay > 0,
        )

    def fresh_params() -> Any:
        return model.init_params(_zeros(batch), seed=experiment.seed)

    try:
        like = jax.eval_shape(lambda: with_params(fresh_params()))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"the model does not take the data: {error}") from error
    _check_whole_run(
        experiment, model=model, params=like.params, batch=batch, calibration=calibration
    )
    shardings = parameter_shardings(like, mesh, rules=model.sharding_rules)
    like = with_shardings(like, shardings)
    if saved.latest_step() is not None:
        return checkpoint.restore(saved, like)
    check = functools.partial(check_model, model=build_model(experiment.model))
    restored = checkpoint.restore_parts(
        experiment.init_from,
        like.params,
        check=check,
        unpadded=model.unpadded_shapes,
    )

    def begin(restored: dict[str, Any]) -> TrainState:
        # Of the fresh parameters only those are computed that nothing replaces.
        return with_params(fresh_params() | restored)

    return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(restored)


def reinit_params(
    state: TrainState, *, patterns: tuple[str, ...], model: Family, batch: Batch, seed: int
) -> TrainState:
    """`state` with the parameters that `patterns` find as they were before the first step."""

    def begin(params: dict[str, Any]) -> dict[str, Any]:
        again, _ = split_trainable(model.init_params(_zeros(batch), seed=seed), patterns)
        _, kept = split_trainable(params, patterns)
        return join_params(again, kept)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.params)  # the average's too
    reinit = jax.jit(begin, out_shardings=shardings, donate_argnums=0)
    return state.replace(
        params=reinit(state.params), ema=None if state.ema is None else reinit(state.ema)
    )


def _zeros(batch: Batch) -> Batch:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch)


def training_plans(
    experiment: Experiment, stage: Stage, calibration: Calibration
) -> dict[str, PrunePlan]:
    """The stage's plans by name, measured and without what is for inference alone."""
    return {
        name: parse_plan(name, library=experiment.plans).calibrated(calibration).for_training()
        for name in stage.config.plans
    }


def make_steps(
    experiment: Experiment,
    plans: Mapping[str, PrunePlan],
    *,
    model: Family,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    state_shardings: TrainState,
) -> dict[str, TrainStep]:
    """A train step for each plan."""
    return {
        name: make_train_step(
            model,
            optimizer=optimizer,
            plan=plan,
            stage=stage.config,
            stage_start=stage.start,
            ema_decay=experiment.train.ema_decay,
            state_shardings=state_shardings,
        )
        for name, plan in plans.items()
    }


def _check_whole_run(
    experiment: Experiment, *, model: Family, params: Any, batch: Any, calibration: Calibration
) -> None:
    """Meets what is wrong with a later stage (patterns, budgets) before the first one has run."""
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    stages = experiment.train.stages()
    all_plans = [
        plan for stage in stages for plan in training_plans(experiment, stage, calibration).values()
    ]
    for stage in stages:
        where, config = f"train.{stage.name}", stage.config
        check_patterns(config.trainable, paths, where=f"{where}.trainable")
        check_patterns(config.reinit, paths, where=f"{where}.reinit")
        groups = tuple(pattern for pattern, _ in config.lr_multipliers)
        check_patterns(groups, paths, where=f"{where}.lr_multipliers")
        if config.calibrate_before:
            calibration = placeholder_ranks(model, plans=all_plans)
        for name, plan in training_plans(experiment, stage, calibration).items():
            loss = functools.partial(model.loss, plan=plan, rng=jax.random.PRNGKey(0))
            try:
                jax.eval_shape(loss, params, batch)
            except ValueError as error:
                raise ConfigError(f"{where}: plan '{name}': {error}") from error
