"""Budgets: how many tokens a step leaves. All sizes are static; an adaptive budget chooses K per
row within them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp

from meteor_jax.pruning.ops.allocate import Assignment
from meteor_jax.pruning.ops.ranks import DEFAULT_ENERGY, RankKind, RankMode
from meteor_jax.types import Array

MAX_TOTALS = 3  # static sizes that a batch is packed into after a step: each is compiled
SMALL_MARGIN = 1.05  # the smallest total, of the mean of K, where nothing was measured
LONG_ROW = 1.25  # a row of more than this share of the mean of K is rare

Edges = tuple[tuple[int, tuple[float, ...]], ...]  # see `Adaptive.edges`


@dataclasses.dataclass(frozen=True)
class Budget:
    """Base: `keep` tokens of each image."""

    name: ClassVar[str] = ""

    keep: int

    @property
    def bounds(self) -> tuple[int, int]:
        """(K_min, K_max): the fewest and the most visual tokens of an image that are left."""
        return self.keep, self.keep

    def num_kept(self, signal: Array | None, *, num_images: Array, available: Array) -> Array:
        """int32[B]: visual tokens that each row keeps of the `available` (int32[B]) it has.

        Shapes:
            signal: float32[B] or None; `Ranking.budget_signal`.
        """
        return jnp.minimum(self._per_image(signal) * num_images, available).astype(jnp.int32)

    def _per_image(self, signal: Array | None) -> Array | int:
        return self.keep

    def totals(self, *, rows: int, available: int) -> tuple[int, ...]:
        """Static numbers of visual tokens, increasing, for `rows` images together, of each of
        which `available` reach the step. The last holds any K."""
        return (rows * min(self.bounds[1], available),)

    def cache_lengths(self, *, available: int) -> tuple[int, ...]:
        """Visual tokens of an image, increasing, that a cache may be cut to after prefill."""
        return (min(self.bounds[1], available),)


@dataclasses.dataclass(frozen=True)
class Fixed(Budget):
    """`keep` tokens of each image, exactly."""

    name: ClassVar[str] = "fixed"


@dataclasses.dataclass(frozen=True)
class Shared(Budget):
    """`keep` tokens of an image over all encoders that can drop some at the point (ConvNeXt only at
    its end: our reading).

    Attributes:
        assignment: how they are shared among the encoders. "rank" is METEOR's k · r / Σ r,
            "uniform" and "inverse_rank" are its ablations; "tokens" goes by how many an encoder
            has.
        rank: what a numerical rank is, METEOR is silent on which: the singular values that hold
            the share `energy` of the spectral "energy" (our reading), the "effective" rank, or the
            singular values above the floating-point "tolerance", by which nearly every real map is
            full, so that shares follow the number of tokens (see `ops.ranks.RankKind`).
        energy: the share that `rank="energy"` counts up to.
        ranks: (encoder, rank of its features at this point), measured offline.
    """

    name: ClassVar[str] = "shared"

    assignment: Assignment = "rank"
    rank: RankMode = "energy"
    energy: float = DEFAULT_ENERGY
    ranks: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        RankKind(self.rank, self.energy)  # refuses what is none

    @property
    def rank_kind(self) -> RankKind | None:
        """What is measured for this budget; None where it does not go by ranks."""
        return RankKind(self.rank, self.energy) if "rank" in self.assignment else None


@dataclasses.dataclass(frozen=True)
class Adaptive(Budget):
    """METEOR's K = λ · Σ of the visual attention values of the chosen heads, one K an example, of
    `keep` on average over the calibration set. Any method that returns a `budget_signal` can use
    it, before a layer of the decoder.

    Attributes:
        lambda_: λ, measured offline; None where it was not.
        budget_range: K is clipped to [budget_range[0]·keep, budget_range[1]·keep]; our reading.
        num_totals: static sizes, at most, that the rows of a batch are packed into together; the
            last holds any K.
        edges: (rows, visual tokens of an image that the smaller totals hold, mean over so many
            rows), measured offline; without, a little and a half more than `keep`.
    """

    name: ClassVar[str] = "adaptive"

    lambda_: float | None = None
    budget_range: tuple[float, float] = (0.5, 1.5)
    num_totals: int = 3
    edges: Edges = ()

    def __post_init__(self) -> None:
        if not 1 <= self.num_totals <= MAX_TOTALS:
            raise ValueError(f"num_totals: expected 1 to {MAX_TOTALS}, got {self.num_totals}.")
        low, high = self.budget_range
        if not 0 <= low <= 1 <= high:  # the mean of K must lie between them
            raise ValueError(
                f"budget_range: expected a share up to 1 and a multiple from 1 on, got {low}, "
                f"{high}."
            )

    @property
    def bounds(self) -> tuple[int, int]:
        low, high = (round(limit * self.keep) for limit in self.budget_range)
        return max(low, 1), high

    def _per_image(self, signal: Array | None) -> Array:
        if signal is None or self.lambda_ is None:
            lacks = "a measured λ" if signal is not None else "a method that weighs each example"
            raise ValueError(f"an adaptive budget needs {lacks}; calibrate, or use a fixed budget.")
        wanted = jnp.nan_to_num(jnp.round(self.lambda_ * signal))  # not a number: the least
        return jnp.clip(wanted, *self.bounds).astype(jnp.int32)

    def totals(self, *, rows: int, available: int) -> tuple[int, ...]:
        low, high = (min(bound, available) for bound in self.bounds)
        edges: tuple[float, ...] = ()
        if low < high:
            edges = (SMALL_MARGIN * self.keep, (self.keep + high) / 2)
            if self.edges:
                measured = dict(self.edges)  # fewer rows vary more, so they are safe for more
                edges = measured[max((n for n in measured if n <= rows), default=min(measured))]
        smaller = {math.ceil(rows * edge) for edge in edges[: self.num_totals - 1]}
        return (*sorted(size for size in smaller if rows * low <= size < rows * high), rows * high)

    def cache_lengths(self, *, available: int) -> tuple[int, ...]:
        low, high = (min(bound, available) for bound in self.bounds)
        usual = round(LONG_ROW * self.keep)
        return (usual, high) if low <= usual < high else (high,)


BUDGETS: dict[str, type[Budget]] = {cls.name: cls for cls in (Fixed, Shared, Adaptive)}


def steps_that_drop(budgets: Sequence[Budget], *, available: int) -> tuple[int, ...]:
    """Which of the decoder's steps, in their order, can drop something of the `available` visual
    tokens of an image.

    Raises:
        ValueError: if a step keeps more than reach it.
    """
    drops = []
    for index, budget in enumerate(budgets):
        if budget.keep > available:
            raise ValueError(
                f"decode.keep={budget.keep} but only {available} visual tokens of an image are "
                "left there; lower it."
            )
        low, high = budget.bounds
        if low < available:
            drops.append(index)
        available = min(high, available)
    return tuple(drops)
