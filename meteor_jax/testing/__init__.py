"""A model, prompts and plans so small that a test compiles them in seconds; for your tests too.

In a test:

    plan = dummy_plan("fastv(layer=2, keep=7)")
    forward = jax.jit(functools.partial(dummy_model().module.apply, plan=plan))
    out = forward({"params": dummy_params()}, dummy_batch())
    assert out.logits.shape == (3, 12, 50)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from meteor_jax.data.tokenizers import After
from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.models.eagle.model import MeteorConfig
from meteor_jax.models.encoders.clip.model import ClipConfig
from meteor_jax.models.encoders.convnext.model import ConvNextConfig
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig
from meteor_jax.models.family import Family, build_model
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import parse_plan
from meteor_jax.types import IMAGE_TOKEN, Batch

TEXT_LENGTH = 12
VOCAB_SIZE = 50

# Of the dummy model: 48 visual tokens, 16 of each encoder, and four decoder layers.
DUMMY_CALIBRATION = Calibration(
    ranks={
        "energy 0.99": {
            "clip": (4.0, 5.0, 6.0),
            "convnext": (3.0, 3.0, 3.0),
            "pix2struct": (2.0, 3.0, 4.0),
        }
    }
)
DUMMY_PLANS = {
    "full": "full",
    "stage 1": "meteor(encode=(26, 22, 30), fuse=30)",
    "stage 2": "meteor(encode=(32, 32, 48), fuse=20)",
    "stage 3": "fastv(layer=2, keep=7)",
    "meteor": "meteor(encode=(26, 22, 30), fuse=20, layers=(1, 3), keep=(14, 6), decode.heads=2, "
    "decode.lambda_=(9.0, 5.0))",
    "pyramiddrop": "pyramiddrop(layers=(1, 2, 3), keep=(24, 12, 6))",
    "random": "random(keep=9)",
}


def dummy_config(**fields: Any) -> MeteorConfig:
    """Three encoders over images of 32 × 32 pixels; `fields` replace those of the config."""
    config = MeteorConfig(
        encoders={
            "clip": ClipConfig(
                image_size=32, patch_size=8, width=16, depth=3, num_heads=2, mlp_dim=24
            ),
            "convnext": ConvNextConfig(
                image_size=32, depths=(1, 1), widths=(8, 16), layer_scale_init=0.5
            ),
            "pix2struct": Pix2StructConfig(
                grid_side=4,
                patch_size=8,
                width=16,
                depth=3,
                num_heads=2,
                mlp_dim=24,
                num_positions=8,
            ),
        },
        llama=LlamaConfig(
            depth=4,
            width=32,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=48,
            vocab_size=VOCAB_SIZE,
            max_positions=256,
            init_std=0.2,
        ),
        grid=4,
        image_size=32,
    )
    return dataclasses.replace(config, **fields)


def dummy_model(**fields: Any) -> Family:
    """The model of `dummy_config(**fields)`; `.module` is its Linen module."""
    return build_model(dummy_config(**fields))


@functools.cache
def dummy_params(**fields: Any) -> Any:
    """Random float32 parameters of `dummy_model(**fields)`; drawn once in a process."""
    init = jax.jit(functools.partial(dummy_model(**fields).init_params, seed=0))
    with jax.ensure_compile_time_eval():  # values, also where the caller is being traced
        return init(dummy_batch())


def dummy_batch(
    *,
    lengths: Sequence[int] = (12, 9, 6),
    with_image: Sequence[bool] = (True, True, False),
    text_length: int = TEXT_LENGTH,
    seed: int = 0,
) -> Batch:
    """Random prompts of unequal length as NumPy arrays; the image placeholder is token 2.

    Args:
        lengths: by row, tokens of the prompt, at most `text_length`.
        with_image: by row, whether there is an image.
    """
    rng = np.random.default_rng(seed)
    rows, has_image = len(lengths), np.asarray(with_image)
    tokens = rng.integers(3, VOCAB_SIZE, (rows, text_length)).astype(np.int32)
    valid = np.arange(text_length) < np.asarray(lengths)[:, None]
    tokens[has_image, 2] = IMAGE_TOKEN
    return Batch(
        images=rng.integers(0, 256, (rows, 1, 32, 32, 3)).astype(np.uint8),
        image_valid=has_image[:, None],
        tokens=np.where(valid, tokens, 0),
        text_valid=valid,
        labels=tokens,
        example_id=np.arange(rows, dtype=np.int32),
    )


def dummy_plan(text: str) -> PrunePlan:
    """A plan in the form of `--plans`, or the name of one of `DUMMY_PLANS`, calibrated."""
    return parse_plan(DUMMY_PLANS.get(text, text)).calibrated(DUMMY_CALIBRATION)


class DummyTokenizer:
    """An id for each small letter, digit and some signs; fits the dummy model's vocabulary."""

    vocab_size = VOCAB_SIZE
    pad_id, bos_id, eos_id = 0, 1, 2
    _characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,:?!'-\n"

    def encode(self, text: str, *, bos: bool = False, after: After = "start") -> list[int]:
        """Characters that have no id are left out."""
        del after
        ids = [self._characters.find(character) + 3 for character in text.lower()]
        return [self.bos_id] * bos + [i for i in ids if i >= 3]

    def decode(self, ids: Sequence[int]) -> str:
        last = len(self._characters) + 3
        return "".join(self._characters[int(i) - 3] for i in ids if 3 <= i < last)

    def special_id(self, name: str) -> int | None:
        return {"<pad>": self.pad_id, "<s>": self.bos_id, "</s>": self.eos_id}.get(name)
