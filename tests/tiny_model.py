"""The dummy model of `meteor_jax.testing` and its programs, which all tests share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.testing import (
    DUMMY_CALIBRATION,
    DUMMY_PLANS,
    dummy_batch,
    dummy_config,
    dummy_model,
    dummy_params,
    dummy_plan,
)
from meteor_jax.types import Batch

NUM_VISUAL = 48
TEXT_LENGTH = 12
VOCAB = 50

CONFIG = dummy_config()
MODEL = dummy_model().module
RANKS = DUMMY_CALIBRATION
PLANS = DUMMY_PLANS
METEOR = PLANS["meteor"]

make_batch = dummy_batch
params = dummy_params
plan = dummy_plan


def row(batch: Any, i: int) -> Any:
    """Row `i` alone, still a batch."""
    return jax.tree.map(lambda x: np.asarray(x)[i : i + 1], batch)


def keep_all() -> PrunePlan:
    """Every stage on, nothing dropped."""
    return plan(
        "meteor(encode=(32, 32, 48), fuse=48, layers=(1, 2, 3), keep=(48, 48, 48), "
        "decode.budget=fixed)"
    )


@functools.partial(jax.jit, static_argnames="plan")
def forward(params: Any, batch: Batch, *, plan: PrunePlan) -> Any:
    return MODEL.apply({"params": params}, batch, plan=plan)


@functools.partial(jax.jit, static_argnames="plan")
def encode(params: Any, images: Any, *, plan: PrunePlan) -> Any:
    """Encoded images of [B, 1, H, W, 3], tokens as [B, 1, N, D]."""
    encoded = MODEL.apply({"params": params}, images[:, 0], plan=plan, method="encode_images")
    return encoded.replace(tokens=jax.tree.map(lambda x: x[:, None], encoded.tokens))


@functools.partial(jax.jit, static_argnames=("plan", "max_new_tokens"))
def prefill(params: Any, visual: Any, batch: Batch, *, plan: PrunePlan, max_new_tokens: int) -> Any:
    return MODEL.apply(
        {"params": params},
        visual,
        image_valid=batch.image_valid,
        tokens=batch.tokens,
        text_valid=batch.text_valid,
        plan=plan,
        max_new_tokens=max_new_tokens,
        method="prefill",
    )


@jax.jit
def extend(params: Any, cache: Any, tokens: Any) -> Any:
    return MODEL.apply({"params": params}, cache, tokens, method="extend")
