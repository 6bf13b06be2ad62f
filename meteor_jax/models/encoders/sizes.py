"""What the configs of encoders share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from meteor_jax.config import ConfigError, suggest
from meteor_jax.models.layers.stack import segment_bounds
from meteor_jax.pruning.points import NUM_SEGMENTS


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Base of every encoder's config, a frozen dataclass. `type` is its name in
    `encoders.registry.ENCODERS`; for `remat` see `Stack`."""

    type: str
    remat: str

    @classmethod
    def class_for(cls, values: Mapping[str, Any], *, where: str) -> type:
        """The class to build from the fields `values`; see `config.build`. Where they have no
        `type` it is the name that the model gives the encoder."""
        from meteor_jax.models.encoders.registry import ENCODERS  # which imports this file

        if cls is not EncoderConfig:
            return cls
        name = values.get("type", where.rpartition(".")[2])
        if name not in ENCODERS:
            raise ConfigError(f"{where}.type: no encoder '{name}'.{suggest(name, ENCODERS)}")
        return ENCODERS[name].config


class TransformerSizes(EncoderConfig):
    """What a plan must know of an encoder (`EncoderShape`): the base of its config.

    Attributes:
        prunable: after which segments tokens can be dropped.
        num_windows: what a number of kept tokens must be a multiple of.
        period: blocks after which their kinds repeat; no segment ends inside a period.
        prunes_in_blocks: whether tokens can be reduced between attention and MLP of a block.
    """

    prunable = (True, True, True)
    num_windows = 1
    period = 1
    prunes_in_blocks = True

    @property
    def grid(self) -> int:
        """Side of the output grid."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Width of a token that comes out."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def token_width(self) -> int:
        """Width of a token between the segments, as pruning methods see it."""
        return self.width

    @property
    def segment_ends(self) -> tuple[int, ...]:
        """The block at which each segment ends."""
        return segment_bounds(self.depth, NUM_SEGMENTS, period=self.period)


def check_multiple(name: str, value: int, *, of: str, factor: int) -> None:
    """Raises ValueError unless `value` is a multiple of `factor`, which is called `of`."""
    if value % factor:
        raise ValueError(f"{name}: expected a multiple of {of} {factor}, got {value}.")
