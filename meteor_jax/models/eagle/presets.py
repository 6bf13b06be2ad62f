"""The released EAGLE models by name (NVlabs/EAGLE), and their METEOR form.

EAGLE joins its encoders' channels on a 32 × 32 grid before one projector; METEOR gives every
encoder a projector of its own and joins their tokens. The encoders and decoders are the same.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from meteor_jax.config import ConfigError, suggest
from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.models.eagle.config import MeteorConfig, default_encoders

ENCODERS = {
    "x4": ("clip", "convnext", "eva02", "pix2struct"),
    "x5": ("clip", "convnext", "sam", "eva02", "pix2struct"),
}
VICUNA_7B = LlamaConfig()
VICUNA_13B = LlamaConfig(depth=40, width=5120, num_heads=40, num_kv_heads=40, mlp_dim=13824)
LLAMA3_8B = LlamaConfig(
    num_kv_heads=8,
    mlp_dim=14336,
    vocab_size=128257,
    pad_vocab_to_multiple_of=128,
    max_positions=8192,
    rope_theta=5e5,
)
YI_34B = LlamaConfig(
    depth=60,
    width=7168,
    num_heads=56,
    num_kv_heads=8,
    mlp_dim=20480,
    vocab_size=64000,
    rope_theta=5e6,
)
# What a released checkpoint is called: its encoders, its decoder, its conversation template.
MODELS = {
    "x4_7b": ("x4", VICUNA_7B, "vicuna_v1"),
    "x5_7b": ("x5", VICUNA_7B, "vicuna_v1"),
    "x4_13b": ("x4", VICUNA_13B, "vicuna_v1"),
    "x5_13b": ("x5", VICUNA_13B, "vicuna_v1"),
    "x4_8b": ("x4", LLAMA3_8B, "llama3"),
    "x5_8b": ("x5", LLAMA3_8B, "llama3"),
    "x4_34b": ("x4", YI_34B, "yi"),
    "x5_34b": ("x5", YI_34B, "yi"),
}


def eagle_config(
    name: str,
    *,
    fusion: Literal["pre", "post"] = "pre",
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    remat: str = "none",
) -> MeteorConfig:
    """The model called `name` in `MODELS`: EAGLE itself ("pre"), or its METEOR form ("post").

    `remat` goes to every encoder and to the decoder; see `layers.Stack`.

    Raises:
        ConfigError: for an unknown name, with the nearest.
    """
    if name not in MODELS:
        raise ConfigError(f"no EAGLE model '{name}'.{suggest(name, MODELS)}")
    vision, llama, _ = MODELS[name]
    return MeteorConfig(
        encoders={
            encoder: dataclasses.replace(config, remat=remat)
            for encoder, config in default_encoders(*ENCODERS[vision]).items()
        },
        encoder_order=ENCODERS[vision],
        llama=dataclasses.replace(llama, remat=remat),
        fusion=fusion,
        grid=32,
        image_size=1024,
        dtype=dtype,
    )


def template_of(name: str) -> str:
    """The conversation template that a released model was trained with."""
    return MODELS[name][2]
