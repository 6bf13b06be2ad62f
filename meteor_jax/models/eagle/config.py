"""What a `Meteor` is made of: which encoders, which decoder, and how they are joined."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from meteor_jax.models.decoders.llama.model import LlamaConfig
from meteor_jax.models.encoders.registry import ENCODERS
from meteor_jax.models.encoders.sizes import EncoderConfig
from meteor_jax.models.family import ModelConfig
from meteor_jax.models.layers.remat import remat_policy
from meteor_jax.pruning.method import Method
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.points import DECODER, FUSION
from meteor_jax.pruning.points import ENCODERS as ALL_ENCODERS
from meteor_jax.pruning.text import parse_method

RESERVED = (
    ALL_ENCODERS,
    FUSION,
    DECODER,
    "llama",
    "projector",
    "pruning",
    "config",
    "name",
    "parent",
    "scope",
)


class Encoders(dict[str, EncoderConfig]):
    """Encoders by name, in order; not changed once made, so that configs can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def default_encoders(*types: str) -> Encoders:
    """One encoder of each type at its default sizes, called as its type."""
    configs: dict[str, Any] = {name: ENCODERS[name].config for name in types}
    return Encoders((name, config()) for name, config in configs.items())


@dataclasses.dataclass(frozen=True)
class MeteorConfig(ModelConfig):
    """Which encoders, which decoder, and how they are joined.

    Attributes:
        encoders: configs of encoders by name; two may be of one `type`. Their parameters are at
            `<name>/` and `projector_<name>/`.
        encoder_order: the order of their tokens or channels. What it leaves out is not used; ()
            takes all, in alphabetical order, as config files do not keep another one.
        fusion: "post": a projector an encoder, tokens joined along the sequence (METEOR);
            "pre": channels joined on a common grid, one projector (EAGLE).
        grid: side of the common grid of "pre".
        image_size: side of the images that all encoders start from.
        dtype: of the computation; parameters are float32.
        learned_methods: pruning methods with parameters of their own, as plan texts write them
            (`name` or `name(field=value)`); the parameters are at `pruning/<name>`.
    """

    family: Literal["eagle"] = "eagle"
    encoders: dict[str, EncoderConfig] = dataclasses.field(
        default_factory=lambda: default_encoders("clip", "convnext", "pix2struct")
    )
    encoder_order: tuple[str, ...] = ()
    llama: LlamaConfig = LlamaConfig()
    fusion: Literal["post", "pre"] = "post"
    grid: int = 32
    image_size: int = 1024
    dtype: Literal["float32", "bfloat16"] = "float32"
    learned_methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        order = self.encoder_order or tuple(sorted(self.encoders))
        if not order or len({*order}) < len(order) or not {*order} <= self.encoders.keys():
            raise ValueError(
                f"encoder_order: expected names out of {', '.join(self.encoders) or 'encoders'}, "
                f"each once, got {order}."
            )
        for name in order:
            if not name.isidentifier() or name in RESERVED or name.startswith("projector_"):
                raise ValueError(f"encoders: '{name}' cannot be an encoder's name; choose another.")
        object.__setattr__(self, "encoder_order", order)
        object.__setattr__(self, "encoders", Encoders((n, self.encoders[n]) for n in order))
        for name, part in (*self.encoders.items(), ("llama", self.llama)):
            try:
                remat_policy(part.remat)
            except ValueError as error:
                raise ValueError(f"{name}.remat: {error}") from None
        for text in self.learned_methods:
            parse_method(text)

    def encoder(self, name: str) -> Any:
        """The config of one encoder."""
        return self.encoders[name]

    def with_encoders(self, *names: str, **changed: EncoderConfig) -> MeteorConfig:
        """With these encoders alone (all where none is named), in this order, and `changed` ones
        in the place of those of the same name."""
        names = names or self.encoder_order
        encoders = {name: changed.get(name, self.encoders.get(name)) for name in names}
        return dataclasses.replace(self, encoders=encoders, encoder_order=names)

    def active_encoders(self, plan: PrunePlan) -> tuple[str, ...]:
        """The encoders that `plan` runs, in the model's order.

        Raises:
            ValueError: if the plan names an encoder, or a reduction point, that the model lacks.
        """
        points = {ALL_ENCODERS: ("segment",), FUSION: ("",), DECODER: ("layer",)}
        plan.check_points(points | dict.fromkeys(self.encoders, ("segment", "block")))
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
