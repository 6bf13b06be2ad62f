"""`Calibration`: numbers measured offline that plans need, `calibration.json` in a workdir."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from meteor_jax.config import ConfigError, build
from meteor_jax.pruning.budgets import Shared
from meteor_jax.pruning.plan import PrunePlan, Step
from meteor_jax.pruning.points import NUM_SEGMENTS


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Numbers measured offline.

    Attributes:
        ranks: by kind of rank ("energy 0.99", "effective", "tolerance"; see `ranks.RankKind`) and
            encoder, the rank of its features after each segment.
        plans: by name, each plan with the λ and edges of its decoder's steps, as `to_json` has it.
    """

    ranks: dict[str, dict[str, tuple[float, ...]]] = dataclasses.field(default_factory=dict)
    plans: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def measured(self, name: str) -> PrunePlan | None:
        """The plan of that name as it was measured."""
        if name not in self.plans:
            return None
        return PrunePlan.from_json(json.dumps(self.plans[name]), where=f"measured plan '{name}'")

    def apply(self, plan: PrunePlan) -> PrunePlan:
        """`plan` with the ranks and λ that were measured. An edited plan needs its own λ."""
        measured = self.measured(plan.name)
        if measured is not None and measured.fingerprint == plan.fingerprint:
            plan = plan.with_decoder_budgets([step.budget for step in measured.decoder_steps])
        return plan.map_steps(self._with_ranks, stage="encode")

    def _with_ranks(self, step: Step) -> Step:
        budget = step.budget
        kind = budget.rank_kind if isinstance(budget, Shared) else None
        if str(kind) not in self.ranks:
            return step
        after = step.point.index - 1
        ranks = {name: rank[after] for name, rank in self.ranks[str(kind)].items()}
        return dataclasses.replace(
            step, budget=dataclasses.replace(budget, ranks=tuple(ranks.items()))
        )

    def with_plan(self, plan: PrunePlan) -> Calibration:
        """This calibration and a plan with what was measured for it."""
        return dataclasses.replace(self, plans=self.plans | {plan.name: json.loads(plan.to_json())})

    def save(self, path: Path) -> None:
        """Writes JSON, atomically."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Calibration:
        """Reads what `save` wrote; an absent file is an empty calibration.

        Raises:
            ConfigError: for what is no such file, in one line.
        """
        if not path.is_file():
            return Calibration()
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(
                f"{path}: not valid JSON ({error}); run `meteor calibrate`."
            ) from error
        calibration = build(Calibration, values, where=str(path))
        for kind, of_encoders in calibration.ranks.items():
            for encoder, ranks in of_encoders.items():
                if len(ranks) != NUM_SEGMENTS:
                    raise ConfigError(
                        f"{path}: ranks of {encoder} ({kind}): expected {NUM_SEGMENTS}, one a "
                        f"segment, got {len(ranks)}; run `meteor calibrate --ranks`."
                    )
        return calibration
