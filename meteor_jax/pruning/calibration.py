"""`Calibration`: numbers measured offline that plans need, `calibration.json` in a workdir."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from meteor_jax.config import ConfigError, build
from meteor_jax.pruning.budgets import Adaptive, Budget, Edges, Shared
from meteor_jax.pruning.plan import PrunePlan, Step


@dataclasses.dataclass(frozen=True)
class MeasuredPlan:
    """What was measured for the decoder's steps of one plan.

    Attributes:
        fingerprint: that of the plan as it was measured: an edited one needs its own.
        lambdas: λ of each step. edges: `Adaptive.edges` of each step.
    """

    fingerprint: str
    lambdas: tuple[float, ...]
    edges: tuple[Edges, ...] = ()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Numbers measured offline.

    Attributes:
        ranks: by kind of rank ("energy 0.99", "effective", "tolerance"; see `ranks.RankKind`) and
            encoder, the rank of its features after each segment.
        plans: by name, what was measured for a plan.
    """

    ranks: dict[str, dict[str, tuple[float, ...]]] = dataclasses.field(default_factory=dict)
    plans: dict[str, MeasuredPlan] = dataclasses.field(default_factory=dict)

    def apply(self, plan: PrunePlan) -> PrunePlan:
        """`plan` with the ranks and λ that were measured."""
        measured = self.plans.get(plan.name)
        if measured is not None and measured.fingerprint == plan.fingerprint:
            lambdas = iter(measured.lambdas)
            edges = iter(measured.edges or [()] * len(measured.lambdas))
            plan = plan.with_decoder_budgets(
                [
                    _with_lambda(step.budget, next(lambdas), next(edges))
                    for step in plan.decoder_steps
                ]
            )
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

    def with_plan(self, plan: PrunePlan, budgets: Sequence[Budget]) -> Calibration:
        """This calibration and what was measured for the decoder's steps of `plan`."""
        adaptive = [b if isinstance(b, Adaptive) else Adaptive(b.keep) for b in budgets]
        measured = MeasuredPlan(
            fingerprint=plan.fingerprint,
            lambdas=tuple(1.0 if b.lambda_ is None else b.lambda_ for b in adaptive),
            edges=tuple(b.edges for b in adaptive),
        )
        return dataclasses.replace(self, plans=self.plans | {plan.name: measured})

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
        return build(Calibration, values, where=str(path))


def _with_lambda(budget: Budget, lambda_: float, edges: Edges) -> Budget:
    if not isinstance(budget, Adaptive):
        return budget
    return dataclasses.replace(budget, lambda_=lambda_, edges=edges)
