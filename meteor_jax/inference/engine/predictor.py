"""What an engine needs of a model: images in, then batches of prompts, then one output a prompt.

S shards of the mesh, I images of a shard in one batch, b prompts of a shard, B = S·b prompts,
T prompt tokens, M images of a prompt, N visual tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int32, UInt32

from meteor_jax.inference.engine.data_shards import split_by_rows
from meteor_jax.inference.engine.request import ShapeBucket
from meteor_jax.models.family import Family
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import IMAGE_TOKEN, AnyArray, Array, VisualTokens


class PromptBatch(flax.struct.PyTreeNode):
    """A batch of prompts: [S, b, ...] as hosts lay them out, [B, ...] as the model takes them.

    Attributes:
        seeds: of the rows' sampling.
    """

    tokens: Int32[AnyArray, "*rows T"]
    text_valid: Bool[AnyArray, "*rows T"]
    image_valid: Bool[AnyArray, "*rows M"]
    seeds: UInt32[AnyArray, "*rows"]


class Predictor(Protocol):
    """A model under one plan. `encode` and `predict` return before the device is done, if they can.

    `visual` is any pytree of arrays that begin with the axes of the images; outputs are any pytree
    of arrays that begin with B. `inference.generate.TextPredictor` writes text,
    `inference.classify.ClassPredictor` gives class probabilities; a model with another output needs
    another predictor and nothing else.
    """

    @property
    def image_size(self) -> int:
        """Pixels of the images that `encode` takes."""

    def encode(self, images: Array) -> Any:
        """Visual features [S, I, ...] of uint8[S, I, H, W, 3]."""

    def encode_nothing(self, images: Array) -> Any:
        """What stands in for images in batches of prompts that have none: [S, I, ...] for blank
        `images`. It is never read."""

    def predict(self, visual: Any, prompts: PromptBatch, *, bucket: ShapeBucket) -> Any:
        """Outputs for B prompts about their images in `visual`, [B, M, ...]."""

    def warm_up(self, visual: Any, prompts: PromptBatch, *, bucket: ShapeBucket) -> Any:
        """Compiles whatever `predict` may run for such shapes; returns what is to be waited for."""

    def stream(self, visual: Any, prompts: PromptBatch, *, bucket: ShapeBucket) -> Iterator[str]:
        """The first row's whole text after each token; a predictor without text has none."""

    def read(self, outputs: Any, row: int, *, bucket: ShapeBucket) -> dict[str, Any]:
        """The fields of a `Prediction` that a row of `outputs` gives; they are on the host."""


def fused_shape(model: Any, params: Any, *, plan: PrunePlan) -> VisualTokens:
    """Shapes of one image's `encode_images`, [1, N, D], without computing it.

    Raises:
        ValueError: if the plan does not fit the model.
    """
    size = model.config.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    return jax.eval_shape(
        lambda params, images: (
            model.apply({"params": params}, images, plan=plan, method="encode_images").tokens
        ),
        params,
        images,
    )


def check_fits(model: Family, params: Any, *, plan: PrunePlan) -> int:
    """Traces a plan for a prompt of one image, without computing anything.

    Returns:
        The positions that an image takes in the decoder; 0 for a model without one.

    Raises:
        ValueError: if the plan does not fit the model.
    """
    if model.output != "text":
        jax.eval_shape(
            functools.partial(model.predict_batch, plan=plan), params, model.inputs_spec(1)
        )
        return 0
    fused = fused_shape(model.module, params, plan=plan)
    plan = plan.with_placeholder_lambda()

    def first_token(params: Any, visual: VisualTokens) -> Array:
        prompt = jnp.full((1, 2), IMAGE_TOKEN).at[0, 1].set(0)
        return model.module.apply(
            {"params": params},
            jax.tree.map(lambda x: x[:, None], visual),
            image_valid=jnp.ones((1, 1), bool),
            tokens=prompt,
            text_valid=jnp.ones((1, 2), bool),
            plan=plan,
            max_new_tokens=0,
            method="prefill",
        ).logits

    jax.eval_shape(first_token, params, fused)
    return fused.span


def encode_by_shard(encode: Callable[[Array], Any], images: Array) -> Any:
    """[S, I, ...] of what `encode` makes [S·I, ...] of uint8[S, I, H, W, 3]; within a program."""
    shape = images.shape[:2]
    flat = split_by_rows(images.reshape(-1, *images.shape[2:]))
    return jax.tree.map(
        lambda leaf: split_by_rows(leaf.reshape(*shape, *leaf.shape[1:])), encode(flat)
    )


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def encode_images(params: Any, images: Array, *, model: Any, plan: PrunePlan) -> VisualTokens:
    """VisualTokens of [S, I, N, D] for uint8[S, I, H, W, 3]."""

    def encode(flat: Array) -> VisualTokens:
        return model.apply({"params": params}, flat, plan=plan, method="encode_images").tokens

    return encode_by_shard(encode, images)
