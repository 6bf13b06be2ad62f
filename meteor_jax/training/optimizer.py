"""AdamW with a warmed-up cosine, learning rates by parameter path, and frozen parameters."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import StageConfig
from meteor_jax.types import Array

CONSTANTS = "tables"  # what stands under this name in a parameter tree never trains


def split_trainable(
    params: dict[str, Any], patterns: tuple[str, ...]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(trainable, frozen) parameters, each a flat dict by path ("llama/blocks/…").

    A parameter trains if one of the regular expressions `patterns` is found in its path, unless
    it is a constant (under "tables": a checkpoint's rotary tables).

    Raises:
        ConfigError: if a pattern matches no parameter.
    """
    flat = flatten_dict(params, sep="/")
    check_patterns(patterns, flat, where="trainable")
    trainable = {
        path: leaf
        for path, leaf in flat.items()
        if CONSTANTS not in path.split("/") and any(re.search(p, path) for p in patterns)
    }
    return trainable, {path: leaf for path, leaf in flat.items() if path not in trainable}


def join_params(trainable: dict[str, Array], frozen: dict[str, Array]) -> dict[str, Any]:
    """The nested dict that `split_trainable` took apart."""
    return unflatten_dict(trainable | frozen, sep="/")


def check_patterns(patterns: tuple[str, ...], paths: Any, *, where: str) -> None:
    """Raises ConfigError for the first of `patterns` that is found in none of `paths`."""
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            roots = sorted({path.split("/")[0] for path in paths})
            raise ConfigError(
                f"{where}: '{pattern}' matches no parameter; they begin with {', '.join(roots)}."
            )


def make_schedule(stage: StageConfig) -> optax.Schedule:
    """Linear warm-up over the first `stage.warmup_ratio` of the steps, then a cosine down to 0."""
    warmup = round(stage.warmup_ratio * stage.steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=stage.learning_rate / max(warmup, 1) if warmup else stage.learning_rate,
        peak_value=stage.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(stage.steps, warmup + 1),
    )


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """The optimizer of one stage, over `split_trainable`'s flat dict of trainable parameters."""

    def scale_groups(updates: Any, _: Any) -> dict[str, Array]:
        return {
            path: update * path_multiplier(path, stage.lr_multipliers)
            for path, update in updates.items()
        }

    def decays(params: dict[str, Array]) -> dict[str, bool]:
        return {path: has_decay(path, leaf) for path, leaf in params.items()}

    return optax.chain(
        optax.clip_by_global_norm(stage.grad_clip) if stage.grad_clip else optax.identity(),
        optax.scale_by_adam(b1=stage.adam_b1, b2=stage.adam_b2),
        optax.add_decayed_weights(stage.weight_decay, mask=decays),
        optax.scale_by_learning_rate(make_schedule(stage)),
        optax.stateless(scale_groups),
    )


def path_multiplier(path: str, groups: tuple[tuple[str, float], ...]) -> float:
    """The multiplier of the first pattern in `groups` that is found in `path`, else 1."""
    return next((scale for pattern, scale in groups if re.search(pattern, path)), 1.0)


def has_decay(path: str, leaf: jax.Array) -> bool:
    """True for matrices; biases, norms and layer scales are vectors and take no weight decay."""
    stacked = "stack" in path.split("/")  # a leading axis of layers
    return leaf.ndim - stacked >= 2
