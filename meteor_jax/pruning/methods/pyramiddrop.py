"""PyramidDrop (CVPR 2025, arXiv 2410.17247)."""

from __future__ import annotations

from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.methods.text_attention import TextAttention
from meteor_jax.pruning.plan import PrunePlan, decoder_steps
from meteor_jax.pruning.registry import preset


@preset
def pyramiddrop(*, layers: tuple[int, ...], keep: tuple[int, ...]) -> PrunePlan:
    """PyramidDrop: several steps, ranked with the next layer's queries and keys of the last prompt
    token, mean over heads; positions are numbered again."""
    method = TextAttention(queries="last", heads=0, score_layer="next")
    steps = decoder_steps(layers, keep, method=method, budget=Fixed, positions="contiguous")
    return PrunePlan("pyramiddrop", steps)
