"""`PrunePlan`: one static description of what is pruned where.

A plan is an ordered list of steps: at which reduction point, by which method, with which budget.
The same object serves training, evaluation, generation, cost counting and ahead-of-time
compilation. It is hashable, so a jitted function takes it as a static argument.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from meteor_jax.config import ConfigError, build, suggest
from meteor_jax.pruning.budgets import BUDGETS, Adaptive, Budget, Shared
from meteor_jax.pruning.encoder_steps import EncoderShape, EncoderStep, resolve_encoder_steps
from meteor_jax.pruning.method import Method
from meteor_jax.pruning.ops.ranks import RankKind
from meteor_jax.pruning.points import DECODER, Point, Stage, before_layer
from meteor_jax.pruning.registry import method_class

if TYPE_CHECKING:
    from meteor_jax.pruning.calibration import Calibration

Positions = Literal["original", "contiguous"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One reduction of tokens.

    Attributes:
        at: the reduction point; see `points`.
        method: what scores, selects or merges: an object of a registered class.
        budget: how many tokens are left.
        positions: in the decoder, whether the tokens left keep their positions ("original"), or
            are numbered again ("contiguous").
        cut_caches: in the decoder, whether the caches of the layers before lose the same tokens
            (IVC-Prune, arXiv 2602.03060), so that every layer decodes over few.
    """

    at: str
    method: Method
    budget: Budget
    positions: Positions = "original"
    cut_caches: bool = False

    def __post_init__(self) -> None:
        point = self.point
        if point.stage not in self.method.stages:
            raise ConfigError(
                f"method '{self.method.name}' cannot act at {self.at}; it acts in "
                f"{', '.join(self.method.stages)}."
            )
        if point.part != DECODER and (self.cut_caches or self.positions != "original"):
            name = "cut_caches" if self.cut_caches else "positions"
            raise ConfigError(f"{self.at}: {name} is for steps before layers of the decoder.")
        if isinstance(self.budget, Adaptive) and point.part != DECODER:
            raise ConfigError(f"{self.at}: an adaptive budget is for layers of the decoder.")
        if self.budget.keep < (0 if point.part == DECODER else 1):
            raise ConfigError(f"{self.at}: expected to keep a token, got keep={self.budget.keep}.")

    @property
    def point(self) -> Point:
        return Point.parse(self.at)

    @property
    def layer(self) -> int:
        """Of a step in the decoder, the layer that it is before."""
        return self.point.index


@dataclasses.dataclass(frozen=True)
class PrunePlan:
    """What is pruned.

    Attributes:
        name: for tables and files.
        steps: in the order of the forward pass.
        encoders: the only encoders to run; () means all (the ablation "one encoder dropped").
        positions: rotary positions of an image's tokens when steps before the decoder dropped
            some: their places among all tokens there would have been ("original"), or 0, 1, 2, …
            ("contiguous").
        enter_at: the decoder's layer that visual tokens enter before; the layers before it see the
            text alone (HiDrop's late injection). Tokens leave early with a budget of 0.
    """

    name: str = "full"
    steps: tuple[Step, ...] = ()
    encoders: tuple[str, ...] = ()
    positions: Positions = "original"
    enter_at: int = 0

    def __post_init__(self) -> None:
        layers = self.decoder_layers
        if any(later <= earlier for earlier, later in itertools.pairwise(layers)):
            raise ConfigError(f"plan '{self.name}': decode.layers must increase, got {layers}.")
        if self.enter_at < 0 or (layers and layers[0] <= self.enter_at > 0):
            raise ConfigError(
                f"plan '{self.name}': tokens enter at layer {self.enter_at}, but decode.layers are "
                f"{layers}; prune after they have entered."
            )

    @property
    def prunes(self) -> bool:
        """Whether any layer sees fewer tokens than there are."""
        return bool(self.steps) or self.enter_at > 0

    @property
    def prunes_encoders(self) -> bool:
        return any(step.point.stage == "encode" for step in self.steps)

    @property
    def fusion_steps(self) -> tuple[Step, ...]:
        return self.stage("fuse")

    @property
    def decoder_steps(self) -> tuple[Step, ...]:
        """The steps before layers of the decoder."""
        return self.stage("decode")

    @property
    def decoder_layers(self) -> tuple[int, ...]:
        """The layers that the decoder's steps are before."""
        return tuple(step.layer for step in self.decoder_steps)

    @property
    def is_adaptive(self) -> bool:
        """Whether examples keep different numbers of tokens."""
        return any(isinstance(step.budget, Adaptive) for step in self.steps)

    @property
    def rank_kinds(self) -> tuple[RankKind, ...]:
        """The feature ranks that its budgets go by."""
        shared = (step.budget for step in self.steps if isinstance(step.budget, Shared))
        return tuple(dict.fromkeys(filter(None, (budget.rank_kind for budget in shared))))

    @property
    def missing_ranks(self) -> tuple[RankKind, ...]:
        """Those that it goes by and does not hold."""
        without = (s for s in self.stage("encode") if not getattr(s.budget, "ranks", ()))
        return dataclasses.replace(self, steps=tuple(without)).rank_kinds

    def stage(self, name: Stage) -> tuple[Step, ...]:
        """The steps in the encoders ("encode"), at fusion ("fuse"), in the decoder ("decode")."""
        return tuple(step for step in self.steps if step.point.stage == name)

    def without(self, name: Stage) -> PrunePlan:
        """This plan without the steps of one stage."""
        kept = tuple(step for step in self.steps if step.point.stage != name)
        return dataclasses.replace(self, steps=kept)

    def map_steps(self, change: Callable[[Step], Step], *, stage: Stage | None = None) -> PrunePlan:
        """This plan with `change` of every step, or of those of one stage."""
        steps = (change(step) if stage in (None, step.point.stage) else step for step in self.steps)
        return dataclasses.replace(self, steps=tuple(steps))

    def with_decoder_budgets(self, budgets: Sequence[Budget]) -> PrunePlan:
        """This plan with other budgets of its decoder's steps, one each."""
        left = iter(budgets)
        return self.map_steps(
            lambda step: dataclasses.replace(step, budget=next(left)), stage="decode"
        )

    def calibrated(self, calibration: Calibration) -> PrunePlan:
        """This plan with the ranks and λ that were measured."""
        return calibration.apply(self)

    def for_training(self) -> PrunePlan:
        """Without the decoder's steps, which are for inference, unless their method trains too."""
        steps = (s for s in self.steps if s.point.stage != "decode" or s.method.in_training)
        return dataclasses.replace(self, steps=tuple(steps))

    def encoder_steps(
        self, encoders: Mapping[str, EncoderShape]
    ) -> dict[str, tuple[EncoderStep, ...]]:
        """What every encoder drops where, with shared budgets settled, by encoder name.

        Raises:
            ValueError: if a budget is larger than the tokens there are, or ranks are missing.
        """
        steps = [(s.point, s.method, s.budget) for s in self.stage("encode")]
        return resolve_encoder_steps(steps, encoders)

    def check_points(self, kinds: Mapping[str, Sequence[str]]) -> None:
        """Refuses a step at a point that the model does not have.

        Args:
            kinds: by part of the model, the kinds of points that it has ("segment", "layer", …).

        Raises:
            ConfigError: naming the nearest part, or the kinds.
        """
        for step in self.steps:
            part, where = step.point.part, f"plan '{self.name}': no reduction point '{step.at}'"
            if part not in kinds:
                raise ConfigError(f"{where} in this model.{suggest(part, kinds)}")
            if step.point.kind not in kinds[part]:
                valid = ", ".join(
                    f"{part}.{kind}<number>" if kind else part for kind in kinds[part]
                )
                raise ConfigError(f"{where}; this model has {valid}.")

    def check_measured(self) -> None:
        """Refuses an adaptive budget without its λ.

        Raises:
            ConfigError: if the budget is adaptive and λ was never measured.
        """
        budgets = (step.budget for step in self.steps)
        if any(isinstance(b, Adaptive) and b.lambda_ is None for b in budgets):
            raise ConfigError(
                f"plan '{self.name}' is adaptive and needs λ (decode.lambda_): run `meteor "
                f'calibrate --plans="{self.name}"` with the run\'s --config and --workdir, or set '
                "decode.budget=fixed."
            )

    def with_placeholder_lambda(self) -> PrunePlan:
        """λ = 1 where none was measured, for compiling: whatever λ is, the shapes are the same."""

        def fill(step: Step) -> Step:
            if isinstance(step.budget, Adaptive) and step.budget.lambda_ is None:
                return dataclasses.replace(
                    step, budget=dataclasses.replace(step.budget, lambda_=1.0)
                )
            return step

        return self.map_steps(fill)

    @property
    def fingerprint(self) -> str:
        """Tells plans apart that differ in more than what is measured, whatever their names."""

        def unmeasured(step: Step) -> Step:
            budget = step.budget
            if isinstance(budget, Adaptive):
                budget = dataclasses.replace(budget, lambda_=None, edges=())
            elif isinstance(budget, Shared):
                budget = dataclasses.replace(budget, ranks=())
            return dataclasses.replace(step, budget=budget)

        bare = dataclasses.replace(self.map_steps(unmeasured), name="")
        return hashlib.sha256(bare.to_json().encode()).hexdigest()[:16]

    def to_json(self, *, indent: int | None = 2) -> str:
        """Every method and budget as its registered name and its fields."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["steps"] = [
            {
                "at": step.at,
                "method": {"name": step.method.name, **dataclasses.asdict(step.method)},
                "budget": {"name": step.budget.name, **dataclasses.asdict(step.budget)},
                "positions": step.positions,
                "cut_caches": step.cut_caches,
            }
            for step in self.steps
        ]
        return json.dumps(values, indent=indent)

    @staticmethod
    def from_json(text: str, *, where: str = "plan") -> PrunePlan:
        """Reads `to_json`'s text.

        Raises:
            ConfigError: for an unknown field or method, a value of the wrong type, or broken JSON.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not valid JSON ({error}).") from error
        if isinstance(values, Mapping) and isinstance(values.get("steps"), list):
            steps = [_read_step(s, f"{where}.steps[{i}]") for i, s in enumerate(values["steps"])]
            values = {**values, "steps": steps}
        return build(PrunePlan, values, where=where)


def _read_step(values: Any, where: str) -> Step:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected fields by name, got {values!r:.60}.")
    made = dict(values)
    for field, class_of in (("method", method_class), ("budget", budget_class)):
        options = made.get(field)
        if isinstance(options, Mapping) and "name" in options:
            if not isinstance(options["name"], str):
                raise ConfigError(f"{where}.{field}: expected a name, got {options['name']!r:.60}.")
            fields = {key: value for key, value in options.items() if key != "name"}
            made[field] = build(class_of(options["name"]), fields, where=f"{where}.{field}")
    return build(Step, made, where=where)


def budget_class(name: str) -> type[Budget]:
    """Raises ConfigError, with the nearest name, for a budget that there is not."""
    if name not in BUDGETS:
        raise ConfigError(f"no budget '{name}'.{suggest(name, BUDGETS)}")
    return BUDGETS[name]


def decoder_steps(
    layers: Sequence[int],
    keep: Sequence[int],
    *,
    method: Method,
    budget: Callable[[int], Budget],
    positions: Positions = "original",
) -> tuple[Step, ...]:
    """A step before each of `layers`, by one method; `budget` makes its budget of its `keep`.

    Raises:
        ConfigError: if there is not one `keep` a layer.
    """
    if len(layers) != len(keep):
        raise ConfigError(
            f"decode: {len(layers)} layers but {len(keep)} budgets; give one `keep` a layer."
        )
    return tuple(
        Step(before_layer(layer), method, budget(count), positions)
        for layer, count in zip(layers, keep, strict=True)
    )
