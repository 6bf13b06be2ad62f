"""Class probabilities from a model under one plan.

S shards of the mesh, I images of a shard in one batch, B rows, M images of a prompt, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from meteor_jax.inference.engine.predictor import PromptBatch, encode_by_shard
from meteor_jax.inference.engine.request import ShapeBucket
from meteor_jax.models.family import Family
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import Array


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def encode(params: Any, images: Array, *, model: Family, plan: PrunePlan) -> Any:
    """A pytree [S, I, ...] of `Family.encode` for uint8[S, I, H, W, 3]."""
    return encode_by_shard(functools.partial(model.encode, params, plan=plan), images)


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def classify(
    params: Any, visual: Any, prompts: PromptBatch, *, model: Family, plan: PrunePlan
) -> Array:
    """float32[B, C]; see `Family.predict`."""
    return model.predict(
        params,
        visual,
        image_valid=prompts.image_valid,
        tokens=prompts.tokens,
        text_valid=prompts.text_valid,
        plan=plan,
    )


@dataclasses.dataclass(frozen=True)
class ClassPredictor:
    """A model that chooses among `classes`, under one plan; see `Predictor`.

    The text of a prediction is the most probable class.
    """

    model: Family
    params: Any = dataclasses.field(repr=False)
    plan: PrunePlan
    classes: tuple[str, ...]

    @property
    def image_size(self) -> int:
        return self.model.config.image_size

    def encode(self, images: Array) -> Any:
        return encode(self.params, images, model=self.model, plan=self.plan)

    encode_nothing = encode

    def predict(self, visual: Any, prompts: PromptBatch, *, bucket: ShapeBucket) -> Array:
        del bucket  # no text is written
        return classify(self.params, visual, prompts, model=self.model, plan=self.plan)

    warm_up = predict

    def stream(self, visual: Any, prompts: PromptBatch, *, bucket: ShapeBucket) -> Iterator[str]:
        yield self.read(jax.device_get(self.predict(visual, prompts, bucket=bucket)), 0)["text"]

    def read(
        self, outputs: np.ndarray, row: int, *, bucket: ShapeBucket | None = None
    ) -> dict[str, Any]:
        del bucket
        scores = outputs[row]
        return {
            "text": self.classes[int(scores.argmax())],
            "scores": tuple(scores.tolist()),
            "finite": bool(np.isfinite(scores).all()),
        }
