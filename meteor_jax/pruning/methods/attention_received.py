"""The tokens that receive the most attention stay (METEOR, arXiv 2507.20842, deeper segments)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from meteor_jax.pruning.method import Method, ReductionContext
from meteor_jax.pruning.ops.similarity import mean_token_similarity
from meteor_jax.pruning.registry import register
from meteor_jax.types import Array


@register("attention_received")
@dataclasses.dataclass(frozen=True)
class AttentionReceived(Method):
    """Drops the tokens that get the least attention in the segment's last block. An encoder without
    attention (ConvNeXt) drops those most like their mean token instead.

    That the middle segment is "deep", and that attention from all tokens stands for that of a CLS
    token, is our reading of METEOR.

    Attributes:
        queries: whose attention counts: that of "all" tokens, or of the "cls" token, for encoders
            that keep theirs.
    """

    stages = ("encode",)

    queries: Literal["all", "cls"] = "all"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cls_attention" if self.queries == "cls" else "attention_received"})

    def scores(self, x: Array, *, context: ReductionContext) -> Array:
        of_cls = self.queries == "cls"
        received = context.cls_attention if of_cls else context.attention_received
        return -mean_token_similarity(x) if received is None else received
