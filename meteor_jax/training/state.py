"""What training carries from step to step."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from meteor_jax.models.family import ShardingRules
from meteor_jax.parallel.rules import parameter_shardings
from meteor_jax.training.optimizer import split_trainable
from meteor_jax.types import Array


class TrainState(flax.struct.PyTreeNode):
    """Everything that a checkpoint must hold besides the data iterator.

    Attributes:
        step: int32[]; optimizer steps made so far, over all stages.
        params: float32, nested dicts.
        opt_state: of the current stage, over its trainable parameters alone.
        rng: uint32[2]; folded with `step` for anything random in a step.
        ema: a moving average of `params`, or None.
    """

    step: Array
    params: dict[str, Any]
    opt_state: Any
    rng: Array
    ema: dict[str, Any] | None


def make_state(
    params: dict[str, Any],
    *,
    optimizer: optax.GradientTransformation,
    trainable: tuple[str, ...],
    rng: Array,
    use_ema: bool,
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(split_trainable(params, trainable)[0]),
        rng=rng,
        ema=jax.tree.map(jnp.copy, params) if use_ema else None,
    )


def start_stage(
    state: TrainState,
    *,
    optimizer: optax.GradientTransformation,
    trainable: tuple[str, ...],
    mesh: Mesh,
    rules: ShardingRules,
) -> TrainState:
    """`state` with the fresh optimizer state of a new stage, split by the family's `rules`."""
    params, _ = split_trainable(state.params, trainable)
    shardings = parameter_shardings(jax.eval_shape(optimizer.init, params), mesh, rules=rules)
    return state.replace(opt_state=jax.jit(optimizer.init, out_shardings=shardings)(params))
