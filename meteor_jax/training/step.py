"""One training step: loss, gradients of what trains, update, metrics. One program a plan.

A parts that a batch is accumulated over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from meteor_jax.experiment.config import StageConfig
from meteor_jax.models.family import Family, LossSums
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.training.optimizer import join_params, make_schedule, split_trainable
from meteor_jax.training.state import TrainState
from meteor_jax.types import Array, Batch

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    model: Family,
    *,
    optimizer: optax.GradientTransformation,
    plan: PrunePlan,
    stage: StageConfig,
    stage_start: int = 0,
    ema_decay: float = 0.0,
    state_shardings: TrainState | None = None,
) -> TrainStep:
    """A jitted `step(state, batch) -> (state, metrics)` that trains under `plan`'s stages 1 and 2.

    The state is donated. The loss is the mean over the targets of the whole batch, however many
    parts it is accumulated over. Metrics are scalars on the device: loss, accuracy (of the
    targets), grad_norm (before clipping), learning_rate, skipped_rows, tokens (see `LossSums`), and
    those that the family adds.

    Args:
        optimizer: `make_optimizer(stage)`.
        stage_start: the global step at which the stage begins.
        state_shardings: of the new state; must be those of the old one, or the second step
            compiles again.
    """
    plan = plan.for_training()
    schedule = make_schedule(stage)

    def loss_of_part(
        trainable: dict[str, Array], frozen: dict[str, Array], part: Batch, key: Array, total: Array
    ) -> tuple[Array, LossSums]:
        sums = model.loss(join_params(trainable, frozen), part, plan=plan, rng=key)
        # Divided before they are summed over parts, as the gradients are.
        sums = sums.replace(loss=sums.loss / total, correct=sums.correct / total)
        return sums.loss, sums

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        trainable, frozen = split_trainable(state.params, stage.trainable)
        total = jnp.maximum(model.num_targets(batch), 1).astype(jnp.float32)
        key = jax.random.fold_in(state.rng, state.step)

        def gradients(part: Batch) -> tuple[dict[str, Array], LossSums]:
            return jax.grad(loss_of_part, has_aux=True)(trainable, frozen, part, key, total)

        if stage.grad_accum_steps == 1:
            grads, sums = gradients(batch)
        else:
            grads, sums = _sum_over_parts(gradients, batch, num_parts=stage.grad_accum_steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        trained: Any = optax.apply_updates(trainable, updates)
        params = join_params(trained, frozen)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, step_size=1 - ema_decay)
        metrics: dict[str, Any] = {
            "loss": sums.loss,
            "accuracy": sums.correct,
            "tokens": sums.tokens,
            **{name: mean.total / jnp.maximum(mean.count, 1) for name, mean in sums.means.items()},
            "grad_norm": optax.global_norm(grads),
            "learning_rate": schedule(state.step - stage_start),
            "skipped_rows": jnp.sum(batch.example_id < 0),
        }
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return state, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def _sum_over_parts(function: Callable[[Batch], Any], batch: Batch, *, num_parts: int) -> Any:
    """The sum of `function` over `num_parts` parts of the batch, one after the other.

    Row i goes to part i mod A, so that on a mesh every part takes rows from every device.
    """

    def parts(array: Array) -> Array:
        return array.reshape(-1, num_parts, *array.shape[1:]).swapaxes(0, 1)

    batches = jax.tree.map(parts, batch)
    first = jax.tree.map(lambda array: array[0], batches)
    shapes = jax.eval_shape(function, first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(body, zeros, batches)[0]
