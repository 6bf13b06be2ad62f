"""Measures what plans need offline: feature ranks and λ. `python -m meteor_jax.tools.calibrate
--config=configs/tiny.py --workdir=runs/tiny --plans=meteor`.

I images, N tokens, E encoder width, B prompts, K kept tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.models.meteor import Meteor
from meteor_jax.pruning.encode import RankMode, numerical_rank
from meteor_jax.pruning.plan import DecodePlan, PrunePlan
from meteor_jax.types import Array, CutTrace


@flax.struct.dataclass
class CalibrationBatch:
    """Prompts with their images: uint8[B, H, W, 3], int32[B, T], bool[B, T]."""

    images: Array
    tokens: Array
    text_valid: Array


def calibrate_ranks(
    model: Meteor, params: Any, images: Array
) -> dict[str, dict[str, tuple[float, ...]]]:
    """The rank of each encoder's features at each boundary, mean over `images`, by kind of rank.

    Shapes:
        images: uint8[I, H, W, 3]; a few dozen are enough, the rank hardly varies (METEOR).
    """

    @jax.jit
    def ranks(params: Any, images: Array) -> dict[str, dict[str, tuple[Array, ...]]]:
        features = model.apply({"params": params}, images, method="boundary_features")

        def mean_rank(x: Array, mode: str) -> Array:
            return jax.vmap(lambda x: numerical_rank(x, mode=mode))(x).astype(jnp.float32).mean()

        return {
            mode: jax.tree.map(lambda x: mean_rank(x, mode), features) for mode in get_args(RankMode)
        }

    measured = jax.device_get(ranks(params, images))
    return jax.tree.map(float, measured)


def calibrate_scales(
    model: Meteor, params: Any, *, plan: PrunePlan, batches: Sequence[CalibrationBatch]
) -> tuple[float, ...]:
    """λ of every cut of an adaptive plan, such that the mean of K over `batches` is its `keep`.

    Cut after cut, because what a cut sees depends on those before it.
    """
    decode = dataclasses.replace(plan.decode, scale=(1.0,) * len(plan.decode.layers))
    for cut in range(len(decode.layers)):
        current = dataclasses.replace(plan, decode=decode)
        masses = np.concatenate(
            [_chosen_mass(_run(model, params, batch, plan=current)[cut], decode)
             for batch in batches]
        )
        scale = list(decode.scale)
        scale[cut] = fit_scale(masses, low_high=decode.bounds(cut), target=decode.keep[cut])
        decode = dataclasses.replace(decode, scale=tuple(scale))
    return decode.scale


def fit_scale(masses: np.ndarray, *, low_high: tuple[int, int], target: float) -> float:
    """λ by bisection: the mean of clip(round(λ · mass), low, high) meets `target`.

    Raises:
        ValueError: if no attention falls on the image, so that no λ can.
    """
    if not masses.max() > 0:
        raise ValueError("no text attention falls on the image; is the model trained?")

    def mean(scale: float) -> float:
        return float(np.clip(np.round(scale * masses), *low_high).mean())

    low, high = 0.0, 2 * low_high[1] / masses[masses > 0].min()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < target else (low, middle)
    return float(high)


def _run(
    model: Meteor, params: Any, batch: CalibrationBatch, *, plan: PrunePlan
) -> tuple[CutTrace, ...]:
    return jax.device_get(_cuts(model, params, batch, plan=plan))


@jax.jit(static_argnames=("model", "plan"))
def _cuts(
    model: Meteor, params: Any, batch: CalibrationBatch, *, plan: PrunePlan
) -> tuple[CutTrace, ...]:
    variables = {"params": params}
    encoded = model.apply(variables, batch.images, plan=plan, method="encode_images")
    return model.apply(
        variables, jax.tree.map(lambda x: x[:, None], encoded.tokens),
        image_valid=jnp.ones((batch.tokens.shape[0], 1), bool), tokens=batch.tokens,
        text_valid=batch.text_valid, plan=plan, max_new_tokens=0, method="prefill",
    ).cuts


def _chosen_mass(trace: CutTrace, plan: DecodePlan) -> np.ndarray:
    """float[B]: Σ of the visual attention values of the heads that count."""
    values = np.sort(trace.visual_attention_value, axis=1)
    heads = min(plan.heads, values.shape[1]) if plan.heads else values.shape[1]
    return values[:, values.shape[1] - heads :].sum(1)
