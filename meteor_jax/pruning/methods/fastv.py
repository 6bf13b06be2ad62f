"""FastV (ECCV 2024, arXiv 2403.06764)."""

from __future__ import annotations

from meteor_jax.pruning.budgets import Fixed
from meteor_jax.pruning.methods.text_attention import TextAttention
from meteor_jax.pruning.plan import PrunePlan, decoder_steps
from meteor_jax.pruning.registry import preset


@preset
def fastv(*, layer: int = 2, keep: int) -> PrunePlan:
    """FastV: before `layer`, by the last prompt token's attention one layer earlier, mean over
    heads; positions stay."""
    method = TextAttention(queries="last", heads=0)
    return PrunePlan("fastv", decoder_steps((layer,), (keep,), method=method, budget=Fixed))
