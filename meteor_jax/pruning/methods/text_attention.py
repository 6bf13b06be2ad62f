"""The visual tokens that the text attends to most stay, before a layer of the decoder: METEOR's
stage 3 (arXiv 2507.20842), and with other options FastV and PyramidDrop.

B rows, S entries of the packed sequence, H heads.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from meteor_jax.pruning.method import Method, Ranking, ReductionContext, last_text
from meteor_jax.pruning.ops.select import keep_topk
from meteor_jax.pruning.registry import register
from meteor_jax.types import Array, Sequence


@register("text_attention")
@dataclasses.dataclass(frozen=True)
class TextAttention(Method):
    """Scores are the attention that each entry gets, summed over the heads that look at the image
    most. Their visual attention value (VAV), summed too, is what METEOR's budget follows.

    Attributes:
        queries: whose attention counts: text "after_image" (METEOR; our reading of which), or the
            "last" prompt token (FastV, PyramidDrop).
        heads: how many heads count, those with the highest VAV; 0 means all.
        score_layer: the attention of the layer before the step ("previous"), or of the one after
            ("next", PyramidDrop).
        rotary: scores from rotated queries and keys ("with"), or from unrotated ones
            ("without"), which do not favour the encoder that comes last.
    """

    stages = ("decode",)
    needs = frozenset({"attention_received"})

    queries: Literal["after_image", "last"] = "after_image"
    heads: int = 8
    score_layer: Literal["previous", "next"] = "previous"
    rotary: Literal["with", "without"] = "with"

    def query_weights(self, *, context: ReductionContext) -> Array:
        if self.queries == "last":
            return last_text(context.sequence).astype(jnp.float32)
        return super().query_weights(context=context)

    def max_queries(self, num_text: int) -> int:
        return 1 if self.queries == "last" else num_text

    def scores(self, x: Array, *, context: ReductionContext) -> Ranking:
        received = context.attention_received
        vav = visual_attention_value(received, context.sequence)
        heads = keep_topk(vav, keep=min(self.heads or vav.shape[1], vav.shape[1])).idx
        return Ranking(
            scores=jnp.take_along_axis(received, heads[..., None], axis=1).sum(1),
            budget_signal=jnp.take_along_axis(vav, heads, axis=1).sum(1),
        )


def visual_attention_value(attention_received: Array, sequence: Sequence) -> Array:
    """float32[B, H]: VAV_h = Σ_i a_{i,h} over the visual tokens.

    Shapes:
        attention_received: float32[B, H, S]; the text's attention to every entry, head by head.
    """
    return jnp.einsum("bhs,bs->bh", attention_received, sequence.is_visual.astype(jnp.float32))
