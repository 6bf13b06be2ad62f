"""One training step: loss, gradients of what trains, update, metrics. One program a plan.

B rows, A parts that a batch is accumulated over, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from meteor_jax.experiment.config import StageConfig
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.training.loss import batch_loss
from meteor_jax.training.optimizer import join_params, make_schedule, split_trainable
from meteor_jax.training.state import TrainState
from meteor_jax.types import IGNORE_LABEL, Array, Batch

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    model: nn.Module,
    *,
    optimizer: optax.GradientTransformation,
    plan: PrunePlan,
    stage: StageConfig,
    stage_start: int = 0,
    encoders: tuple[str, ...] = (),
    ema_decay: float = 0.0,
    state_shardings: TrainState | None = None,
) -> TrainStep:
    """A jitted `step(state, batch) -> (state, metrics)` that trains under `plan`'s stages 1 and 2.

    The state is donated. The loss is the mean over the supervised tokens of the whole batch,
    however many parts it is accumulated over. Metrics are scalars on the device: loss, accuracy
    (of supervised tokens), grad_norm (before clipping), learning_rate, skipped_rows, tokens (of
    text and images that entered the LLM), and `fused_share/<encoder>`.

    Args:
        optimizer: `make_optimizer(stage)`.
        stage_start: the global step at which the stage begins.
        encoders: names, in the order of `PruneTrace.fused_encoder`'s numbers.
        state_shardings: where the new state lies; must be where the old one lay, or the second
            step compiles again.
    """
    plan = plan.for_training()
    schedule = make_schedule(stage)

    def loss_of_part(
        trainable: dict[str, Array], frozen: dict[str, Array], part: Batch, key: Array, total: Array
    ) -> tuple[Array, dict[str, Array]]:
        sums, trace = batch_loss(model, join_params(trainable, frozen), part, plan=plan, rng=key)
        metrics = {
            "loss": sums.loss / total,
            "accuracy": sums.correct / total,
            **_count_tokens(trace.fused_encoder, part, encoders=encoders),
        }
        return metrics["loss"], metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        trainable, frozen = split_trainable(state.params, stage.trainable)
        total = jnp.maximum(jnp.sum(batch.labels[:, 1:] != IGNORE_LABEL), 1).astype(jnp.float32)
        key = jax.random.fold_in(state.rng, state.step)

        def gradients(part: Batch) -> tuple[dict[str, Array], dict[str, Array]]:
            return jax.grad(loss_of_part, has_aux=True)(trainable, frozen, part, key, total)

        if stage.grad_accum_steps == 1:
            grads, metrics = gradients(batch)
        else:
            grads, metrics = _sum_over_parts(gradients, batch, num_parts=stage.grad_accum_steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        params = join_params(optax.apply_updates(trainable, updates), frozen)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, step_size=1 - ema_decay)
        images = metrics.pop("images")
        metrics = {
            name: value / jnp.maximum(images, 1) if name.startswith("fused_share/") else value
            for name, value in metrics.items()
        }
        metrics |= {
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


def _count_tokens(
    fused_encoder: Array, batch: Batch, *, encoders: tuple[str, ...]
) -> dict[str, Array]:
    """Tokens that enter the LLM, images, and by encoder its share of each image's tokens, summed.

    Shapes:
        fused_encoder: int32[I, N], one row for each place of an image in the batch.
    """
    valid = batch.image_valid.reshape(-1)
    num_images = jnp.sum(valid).astype(jnp.float32)
    text = jnp.sum(batch.text_valid) - jnp.sum(batch.image_valid)  # an image's mark is no token
    counts = {"images": num_images, "tokens": text + num_images * fused_encoder.shape[1]}
    for index, name in enumerate(encoders):
        share = jnp.mean(fused_encoder == index, axis=1)
        counts[f"fused_share/{name}"] = jnp.sum(jnp.where(valid, share, 0.0))
    return counts
