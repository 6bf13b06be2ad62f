"""The plans that an experiment names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meteor_jax.config import ConfigError
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import override, parse_plan

BLIND = "blind"  # text-only baseline: the same model, the question alone
MAJORITY = "majority"  # no model: each task's most frequent answer


def resolve_plans(
    texts: Sequence[str], *, library: Mapping[str, str | PrunePlan], calibration: Calibration
) -> tuple[PrunePlan, ...]:
    """The plans that `texts` name, calibrated; "blind" and "majority" are left out.

    Two plans of one name, such as `fastv(keep=8),fastv(keep=16)`, are told apart by their texts.

    Raises:
        ConfigError: for an unknown plan or field, or one that is named twice.
    """
    plans: dict[str, PrunePlan] = {}
    for text in texts:
        if text in (BLIND, MAJORITY):
            continue
        plan = parse_plan(text, library=library)
        if plan.name in (BLIND, MAJORITY, ""):
            raise ConfigError(
                f"plan '{text}' cannot be called '{plan.name}'; give it another name ({BLIND} and "
                f"{MAJORITY} are baselines that every evaluation adds)."
            )
        if plan.name in plans:
            plan = override(plan, name=text.replace(" ", ""))
        if plan.name in plans:
            raise ConfigError(f"plan '{text}' is named twice; name each plan once.")
        plans[plan.name] = plan.calibrated(calibration)
    return tuple(plans.values())
