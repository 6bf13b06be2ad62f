"""Plans that prune nothing: all encoders, or some of them."""

from __future__ import annotations

from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.registry import preset


@preset
def full() -> PrunePlan:
    """Nothing is pruned."""
    return PrunePlan("full")


@preset
def only(*, encoders: tuple[str, ...] | str) -> PrunePlan:
    """Some encoders alone, nothing pruned: the rival that drops an encoder."""
    encoders = (encoders,) if isinstance(encoders, str) else tuple(encoders)
    return PrunePlan("only_" + "_".join(encoders), encoders=encoders)
