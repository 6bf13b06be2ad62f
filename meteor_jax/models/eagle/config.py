"""What a `Meteor` is made of: which encoders, which decoder, and how they are joined."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.models.encoders.clip.model import ClipConfig
from meteor_jax.models.encoders.convnext.model import ConvNextConfig
from meteor_jax.models.encoders.eva02.model import Eva02Config
from meteor_jax.models.encoders.pix2struct.model import Pix2StructConfig
from meteor_jax.models.encoders.registry import ENCODERS
from meteor_jax.models.encoders.sam.model import SamConfig
from meteor_jax.models.family import ModelConfig
from meteor_jax.models.layers.remat import remat_policy
from meteor_jax.pruning.method import Method
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.points import DECODER, FUSION
from meteor_jax.pruning.points import ENCODERS as ALL_ENCODERS
from meteor_jax.pruning.text import parse_method


@dataclasses.dataclass(frozen=True)
class MeteorConfig(ModelConfig):
    """Which encoders, which decoder, and how they are joined.

    Attributes:
        encoders: names out of `ENCODERS`, in the order of their tokens or channels.
        fusion: "post": a projector an encoder, tokens joined along the sequence (METEOR);
            "pre": channels joined on a common grid, one projector (EAGLE).
        grid: side of the common grid of "pre".
        image_size: side of the images that all encoders start from.
        dtype: of the computation; parameters are float32.
        learned_methods: pruning methods with parameters of their own, as plan texts write them
            (`name` or `name(field=value)`); the parameters are at `pruning/<name>`.
    """

    family: Literal["eagle"] = "eagle"
    encoders: tuple[str, ...] = ("clip", "convnext", "pix2struct")
    clip: ClipConfig = ClipConfig()
    convnext: ConvNextConfig = ConvNextConfig()
    sam: SamConfig = SamConfig()
    eva02: Eva02Config = Eva02Config()
    pix2struct: Pix2StructConfig = Pix2StructConfig()
    llama: LlamaConfig = LlamaConfig()
    fusion: Literal["post", "pre"] = "post"
    grid: int = 32
    image_size: int = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"
    learned_methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = [name for name in self.encoders if name not in ENCODERS]
        if unknown or not self.encoders:
            raise ValueError(
                f"encoders: expected names out of {', '.join(ENCODERS)}, got {self.encoders}."
            )
        for name in (*self.encoders, "llama"):
            try:
                remat_policy(getattr(self, name).remat)
            except ValueError as error:
                raise ValueError(f"{name}.remat: {error}") from None
        for text in self.learned_methods:
            parse_method(text)

    def encoder(self, name: str) -> Any:
        """The config of one encoder."""
        return getattr(self, name)

    def active_encoders(self, plan: PrunePlan) -> tuple[str, ...]:
        """The encoders that `plan` runs, in the model's order.

        Raises:
            ValueError: if the plan names an encoder, or a reduction point, that the model lacks.
        """
        plan.check_points((ALL_ENCODERS, FUSION, DECODER, *self.encoders))
        unknown = [name for name in plan.encoders if name not in self.encoders]
        if unknown:
            raise ValueError(
                f"plan '{plan.name}' runs {', '.join(unknown)}, but the model has "
                f"{', '.join(self.encoders)}."
            )
        return tuple(name for name in self.encoders if not plan.encoders or name in plan.encoders)

    @property
    def methods_with_params(self) -> tuple[Method, ...]:
        """The learned methods."""
        return tuple(parse_method(text) for text in self.learned_methods)

    @property
    def token_widths(self) -> dict[str, int]:
        """Widths of the tokens by part of the model, between blocks."""
        widths = {name: self.encoder(name).token_width for name in self.encoders}
        return widths | {FUSION: self.llama.width, DECODER: self.llama.width}
