"""`EncodePlan`: how many tokens each encoder keeps at each boundary, and how they are chosen."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Protocol

from meteor_jax.pruning.encode import NUM_SEGMENTS, Assignment, Criterion, EncoderCut, allocate
from meteor_jax.pruning.ops.ranks import DEFAULT_ENERGY, RankKind, RankMode


class EncoderShape(Protocol):
    """What a plan must know of an encoder; every encoder config has it."""

    num_tokens: int
    cuttable: tuple[bool, bool, bool]
    num_windows: int
    has_attention: bool


@dataclasses.dataclass(frozen=True)
class EncodePlan:
    """Stage 1: tokens dropped inside the encoders, at the end of each of three segments.

    Attributes:
        keep: tokens left after each boundary, over all encoders that can drop some there
            (ConvNeXt only at its output: our reading); 0 drops none.
        assignment: how a boundary's tokens are shared among the encoders. "rank" is METEOR's
            k_b · r / Σ r, "uniform" and "inverse_rank" are its ablations; "tokens" goes by how
            many an encoder has.
        rank: what a numerical rank is, METEOR is silent on which: the singular values that hold
            the share `energy` of the spectral "energy" (our reading), the "effective" rank, or the
            singular values above the floating-point "tolerance", by which nearly every real map is
            full, so that shares follow the number of tokens (see `ranks.RankKind`).
        energy: the share that `rank="energy"` counts up to.
        ranks: (encoder, rank of its features at each boundary), measured offline.
        criteria: how tokens are chosen at each boundary: "mean_token" (least similar to the mean
            token stay) or "attention" (those that receive the most attention stay; ConvNeXt, which
            has none, uses "mean_token" then). That the middle segment is "deep", and that
            attention received stands for CLS attention, is our reading; "cls" is there for
            encoders that keep their CLS token. The controls are "random" and "uniform".
        seed: of "random", which also depends on the image, the encoder and the boundary.
        merged: share of an encoder's last tokens that gather what is dropped at its output,
            instead of having been chosen (VisionZip).
    """

    keep: tuple[int, int, int]
    assignment: Assignment = "rank"
    rank: RankMode = "energy"
    energy: float = DEFAULT_ENERGY
    ranks: tuple[tuple[str, tuple[float, ...]], ...] = ()
    criteria: tuple[Criterion, Criterion, Criterion] = ("mean_token", "attention", "attention")
    seed: int = 0
    merged: float = 0.0

    def __post_init__(self) -> None:
        RankKind(self.rank, self.energy)  # refuses what is none
        if not 0 <= self.merged < 1:
            raise ValueError(f"encode.merged: expected a share below 1, got {self.merged}.")

    @property
    def rank_kind(self) -> RankKind:
        """What is measured for this plan where it goes by ranks."""
        return RankKind(self.rank, self.energy)

    @property
    def by_rank(self) -> bool:
        """Whether ranks say how tokens are shared."""
        return self.assignment in ("rank", "inverse_rank")

    def encoder_cuts(
        self, encoders: Mapping[str, EncoderShape]
    ) -> dict[str, tuple[EncoderCut, ...]]:
        """What every encoder keeps at every boundary, by encoder name.

        Raises:
            ValueError: if a budget is larger than the tokens there are, or ranks are missing.
        """
        ranks = dict(self.ranks)
        if self.by_rank:
            missing = [name for name in encoders if name not in ranks]
            if missing:
                raise ValueError(
                    f"no feature ranks ({self.rank_kind}) for {', '.join(missing)}: run `meteor "
                    "calibrate` with the run's --config and --workdir, or set "
                    "encode.assignment='uniform'."
                )
        alive = {name: shape.num_tokens for name, shape in encoders.items()}
        cuts: dict[str, list[EncoderCut]] = {name: [] for name in encoders}
        for boundary in range(NUM_SEGMENTS):
            able = [name for name, shape in encoders.items() if shape.cuttable[boundary]]
            if self.keep[boundary]:
                alive |= allocate(
                    self.keep[boundary],
                    ranks={name: ranks[name][boundary] if ranks else 1.0 for name in able},
                    available={name: alive[name] for name in able},
                    assignment=self.assignment,
                    multiple_of={name: encoders[name].num_windows for name in able},
                )
            merged = self.merged if boundary == NUM_SEGMENTS - 1 else 0
            for name, shape in encoders.items():
                criterion = self.criteria[boundary]
                if criterion in ("attention", "cls") and not shape.has_attention:
                    criterion = "mean_token"
                draw = zlib.crc32(f"{self.seed} {name} {boundary}".encode())
                # One token at least is chosen, however few there are.
                gathering = min(round(merged * alive[name]), alive[name] - 1)
                cuts[name].append(EncoderCut(alive[name], criterion, draw, merged=gathering))
        return {name: tuple(cut) for name, cut in cuts.items()}
