"""The smallest whole model: 48 visual tokens of three encoders, a decoder of four layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.models.encoders.clip.model import ClipConfig
from meteor_jax.models.encoders.convnext.model import ConvNextConfig
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import parse_plan
from meteor_jax.types import IMAGE_TOKEN, Batch

NUM_VISUAL = 48
TEXT_LENGTH = 12
VOCAB = 50

CONFIG = MeteorConfig(
    encoders={
        "clip": ClipConfig(image_size=32, patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=24),
        "convnext": ConvNextConfig(
            image_size=32, depths=(1, 1), widths=(8, 16), layer_scale_init=0.5
        ),
        "pix2struct": Pix2StructConfig(
            grid_side=4, patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=24, num_positions=8
        ),
    },
    llama=LlamaConfig(
        depth=4,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=48,
        vocab_size=VOCAB,
        max_positions=256,
        init_std=0.2,
    ),
    grid=4,
    image_size=32,
)
MODEL = Meteor(CONFIG)

RANKS = Calibration(
    ranks={
        "energy 0.99": {
            "clip": (4.0, 5.0, 6.0),
            "convnext": (3.0, 3.0, 3.0),
            "pix2struct": (2.0, 3.0, 4.0),
        }
    }
)
METEOR = (
    "meteor(encode=(26, 22, 30), fuse=20, layers=(1, 3), keep=(14, 6), decode.heads=2, "
    "decode.lambda_=(9.0, 5.0))"
)
PLANS = {
    "full": "full",
    "stage 1": "meteor(encode=(26, 22, 30), fuse=30)",
    "stage 2": "meteor(encode=(32, 32, 48), fuse=20)",
    "stage 3": "fastv(layer=2, keep=7)",
    "meteor": METEOR,
    "pyramiddrop": "pyramiddrop(layers=(1, 2, 3), keep=(24, 12, 6))",
    "random": "random(keep=9)",
}


def row(batch: Any, i: int) -> Any:
    """Row `i` alone, still a batch."""
    return jax.tree.map(lambda x: np.asarray(x)[i : i + 1], batch)


def plan(text: str) -> PrunePlan:
    return parse_plan(text).calibrated(RANKS)


def keep_all() -> PrunePlan:
    """Every stage on, nothing dropped."""
    return plan(
        "meteor(encode=(32, 32, 48), fuse=48, layers=(1, 2, 3), keep=(48, 48, 48), "
        "decode.budget=fixed)"
    )


def make_batch(
    *,
    lengths: tuple[int, ...] = (12, 9, 6),
    with_image: tuple[bool, ...] = (True, True, False),
    seed: int = 0,
    text_length: int = TEXT_LENGTH,
) -> Batch:
    """Rows of unequal length; the image stands at place 2."""
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    tokens = rng.integers(3, VOCAB, (rows, text_length)).astype(np.int32)
    valid = np.arange(text_length) < np.asarray(lengths)[:, None]
    tokens[np.asarray(with_image), 2] = IMAGE_TOKEN
    images = rng.integers(0, 256, (rows, 1, 32, 32, 3)).astype(np.uint8)
    return Batch(
        images=images,
        image_valid=np.asarray(with_image)[:, None],
        tokens=np.where(valid, tokens, 0),
        text_valid=valid,
        labels=tokens,
        example_id=np.arange(rows, dtype=np.int32),
    )


@functools.cache
def params() -> Any:
    init = jax.jit(MODEL.init, static_argnames="plan")
    return init(jax.random.key(0), make_batch(), plan=PrunePlan())["params"]


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
