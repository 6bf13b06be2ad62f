"""The encoders by type. One folder each: the module, its config, its conversion."""

from __future__ import annotations

import dataclasses

import flax.linen as nn

from meteor_jax.config import ConfigError
from meteor_jax.models.conversion import PartConversion
from meteor_jax.models.encoders.clip import conversion as clip_conversion
from meteor_jax.models.encoders.clip import model as clip
from meteor_jax.models.encoders.convnext import conversion as convnext_conversion
from meteor_jax.models.encoders.convnext import model as convnext
from meteor_jax.models.encoders.eva02 import conversion as eva02_conversion
from meteor_jax.models.encoders.eva02 import model as eva02
from meteor_jax.models.encoders.pix2struct import conversion as pix2struct_conversion
from meteor_jax.models.encoders.pix2struct import model as pix2struct
from meteor_jax.models.encoders.sam import conversion as sam_conversion
from meteor_jax.models.encoders.sam import model as sam
from meteor_jax.models.encoders.sizes import EncoderConfig
from meteor_jax.models.family import ShardingRules


@dataclasses.dataclass(frozen=True)
class Encoder:
    """One type of encoder.

    Attributes:
        module: takes (config, dtype); called with images float[I, H, W, 3], `steps` and `context`,
            it returns an `EncoderOutput`, as `Clip` does.
        rules: sharding rules for parameters that `parallel.rules` has no generic rule for.
    """

    module: type[nn.Module]
    config: type[EncoderConfig]
    conversion: PartConversion
    rules: ShardingRules = ()


ENCODERS: dict[str, Encoder] = {
    "clip": Encoder(clip.Clip, clip.ClipConfig, clip_conversion.CONVERSION),
    "convnext": Encoder(
        convnext.ConvNext,
        convnext.ConvNextConfig,
        convnext_conversion.CONVERSION,
        convnext.SHARDING_RULES,
    ),
    "sam": Encoder(sam.Sam, sam.SamConfig, sam_conversion.CONVERSION, sam.SHARDING_RULES),
    "eva02": Encoder(
        eva02.Eva02, eva02.Eva02Config, eva02_conversion.CONVERSION, eva02.SHARDING_RULES
    ),
    "pix2struct": Encoder(
        pix2struct.Pix2Struct, pix2struct.Pix2StructConfig, pix2struct_conversion.CONVERSION
    ),
}


def register_encoder(name: str, encoder: Encoder) -> None:
    """Makes a type of encoder known; `model.encoders.<any name>.type = name` in a config."""
    if ENCODERS.get(name, encoder) != encoder:
        raise ConfigError(f"encoder '{name}' exists; choose another name.")
    ENCODERS[name] = encoder
