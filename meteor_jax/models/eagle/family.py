"""EAGLE and METEOR as a family: text out of encoders, projectors and a decoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from meteor_jax.config import ConfigError
from meteor_jax.models.decoders.loss import hidden_loss
from meteor_jax.models.eagle.conversion import EagleConversion
from meteor_jax.models.eagle.cost import count_cost
from meteor_jax.models.eagle.model import Meteor, MeteorConfig
from meteor_jax.models.encoders.registry import ENCODERS
from meteor_jax.models.family import Family, LossSums, Mean, ShardingRules, register_family
from meteor_jax.models.flops import Cost
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.types import IGNORE_LABEL, Array, Batch, PruneTrace


@register_family("eagle")
@dataclasses.dataclass(frozen=True)
class Eagle(Family):
    """What the packages above `models/` need of a `Meteor`."""

    config: MeteorConfig

    config_class = MeteorConfig
    conversion = EagleConversion()
    output = "text"
    tokenizer_part = "llama"

    @functools.cached_property
    def module(self) -> Meteor:
        return Meteor(self.config)

    @property
    def sharding_rules(self) -> ShardingRules:
        types = dict.fromkeys(encoder.type for encoder in self.config.encoders.values())
        own = (rule for type_ in types for rule in ENCODERS[type_].rules)
        return (*own, (r"(^|/)pruning/", ()))  # parameters of learned methods: small

    @property
    def parts(self) -> Mapping[str, Any]:
        return self.config.encoders | {"llama": self.config.llama}

    def shared_fields(self, parts: Collection[str] | None) -> tuple[str, ...]:
        if parts is None:
            grid = ("grid",) if self.config.fusion == "pre" else ()
            return ("encoder_order", "fusion", "image_size", *grid)
        # The single projector's input is the encoders' channels, one by one.
        return ("encoder_order", "fusion") if "projector" in parts else ()

    def loss(self, params: Any, batch: Batch, *, plan: PrunePlan, rng: Array) -> LossSums:
        """Next-token cross-entropy over the supervised tokens; see `hidden_loss`."""
        module = self.module
        hidden = module.apply(
            {"params": params}, batch, plan=plan, rngs={"dropout": rng}, method="hidden_states"
        )

        def head(params: Any, x: Array) -> Array:
            return module.apply({"params": params}, x, method="logits")

        sums = hidden_loss(head, module.head_params(params), hidden.x, batch.labels)
        tokens, means = self._count(hidden.trace, batch, plan=plan)
        loss = sums.loss
        if hidden.trace.loss is not None:  # of pruning methods: their mean over images is added
            valid = batch.image_valid.reshape(-1)
            added = jnp.sum(jnp.where(valid, hidden.trace.loss, 0)) / jnp.maximum(valid.sum(), 1)
            loss += added * sums.count
        return LossSums(loss, sums.correct, sums.count, tokens=tokens, means=means)

    def num_targets(self, batch: Batch) -> Array:
        return jnp.sum(batch.labels[:, 1:] != IGNORE_LABEL)

    def check_data(self, *, vocabulary: int, classes: Sequence[str]) -> None:
        if vocabulary > self.config.llama.vocab_size:
            raise ConfigError(
                f"model.llama.vocab_size={self.config.llama.vocab_size} is less than the "
                f"tokenizer's {vocabulary} pieces; raise it."
            )

    def count_cost(self, plan: PrunePlan, **options: Any) -> Cost:
        return count_cost(self.config, plan, **options)

    @property
    def unpadded_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.config.llama.unpadded_shapes

    @property
    def max_positions(self) -> int:
        return self.config.llama.max_positions

    @property
    def depth(self) -> int:
        return self.config.llama.depth

    def token_grids(self, plan: PrunePlan) -> Mapping[str, int]:
        if self.config.fusion == "pre":
            return {"all": self.config.grid}
        return {name: self.config.encoder(name).grid for name in self.config.active_encoders(plan)}

    @property
    def tensor_divisor(self) -> int:
        return self.config.llama.num_kv_heads

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(self.config.encoders)

    def with_remat(self, policy: str) -> MeteorConfig:
        parts = {name: dataclasses.replace(part, remat=policy) for name, part in self.parts.items()}
        config = dataclasses.replace(self.config, llama=parts.pop("llama"))
        return config.with_encoders(**parts)

    def _count(
        self, trace: PruneTrace, batch: Batch, *, plan: PrunePlan
    ) -> tuple[Array, dict[str, Mean]]:
        """Tokens that enter the LLM, and each encoder's share of an image's tokens."""
        valid = batch.image_valid.reshape(-1)
        num_images = jnp.sum(valid).astype(jnp.float32)
        # An image's mark is no token.
        text = jnp.sum(batch.text_valid) - jnp.sum(batch.image_valid)
        tokens = text + num_images * trace.fused_encoder.shape[1]
        means = {}
        # Channels that are joined have no encoder of their own.
        names = self.config.active_encoders(plan) if self.config.fusion == "post" else ()
        for index, name in enumerate(names):
            share = jnp.mean(trace.fused_encoder == index, axis=1)
            total = jnp.sum(jnp.where(valid, share, 0.0))
            means[f"fused_share/{name}"] = Mean(total, num_images)
        return tokens, means
