"""What each encoder drops, once the budgets that encoders share are settled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from meteor_jax.pruning.budgets import Budget, Shared
from meteor_jax.pruning.method import Method
from meteor_jax.pruning.ops.allocate import allocate
from meteor_jax.pruning.points import ENCODERS, NUM_SEGMENTS, Point


class EncoderShape(Protocol):
    """What a plan must know of an encoder; every encoder config has it.

    Attributes:
        num_tokens: tokens of an image, if none is dropped.
        prunable: after which segments tokens can be dropped.
        num_windows: what a number of kept tokens must be a multiple of.
    """

    num_tokens: int
    prunable: tuple[bool, bool, bool]
    num_windows: int


@dataclasses.dataclass(frozen=True)
class EncoderStep:
    """One reduction inside one encoder.

    Attributes:
        point: after a segment (`encoder.segment1` to 3), or inside a block (`encoder.block0`, …).
        keep: tokens of an image that are left.
    """

    point: Point
    keep: int
    method: Method

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep: expected at least 1 token, got {self.keep}.")
        if self.point.kind not in ("segment", "block"):
            raise ValueError(f"an encoder has no reduction point '{self.point}'.")
        if self.point.kind == "segment" and not 1 <= self.point.index <= NUM_SEGMENTS:
            raise ValueError(f"{self.point}: segments are 1 to {NUM_SEGMENTS}.")


def resolve_encoder_steps(
    steps: Sequence[tuple[Point, Method, Budget]], encoders: Mapping[str, EncoderShape]
) -> dict[str, tuple[EncoderStep, ...]]:
    """By encoder its steps, in the order of the plan."""
    remaining = {name: shape.num_tokens for name, shape in encoders.items()}
    found: dict[str, list[EncoderStep]] = {name: [] for name in encoders}
    for point, method, budget in steps:
        if point.part == ENCODERS:
            able = [name for name, e in encoders.items() if _can_drop(e, point)]
        elif point.part in encoders:
            able = [point.part]
        else:
            continue  # an encoder that this plan does not run
        for name, count in _shares(budget, point, able, encoders, remaining).items():
            found[name].append(EncoderStep(Point(name, point.kind, point.index), count, method))
            if not method.restores:
                remaining[name] = count
    for name, of_encoder in found.items():
        restoring = [step.method.name for step in of_encoder if step.method.restores]
        if restoring and not all(step.method.restores for step in of_encoder):
            raise ValueError(
                f"{name}: '{restoring[0]}' restores what it drops, so no other step of this "
                "encoder can drop tokens; leave one out."
            )
    return {name: tuple(steps) for name, steps in found.items()}


def _can_drop(shape: EncoderShape, point: Point) -> bool:
    return point.kind != "segment" or shape.prunable[point.index - 1]


def _shares(
    budget: Budget,
    point: Point,
    able: Sequence[str],
    encoders: Mapping[str, EncoderShape],
    remaining: Mapping[str, int],
) -> dict[str, int]:
    if not isinstance(budget, Shared):
        return dict.fromkeys(able, budget.keep)
    ranks = dict(budget.ranks)
    if budget.rank_kind is not None:
        missing = [name for name in encoders if name not in ranks]
        if missing:
            raise ValueError(
                f"no feature ranks ({budget.rank_kind}) for {', '.join(missing)}: run `meteor "
                "calibrate` with the run's --config and --workdir, or set "
                "encode.assignment='uniform'."
            )
    try:
        return allocate(
            budget.keep,
            ranks=ranks,
            available={name: remaining[name] for name in able},
            assignment=budget.assignment,
            multiple_of={name: encoders[name].num_windows for name in able},
        )
    except ValueError as error:
        raise ValueError(f"{point}: {error}") from None
