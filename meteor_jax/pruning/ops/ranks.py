"""Feature ranks: how many directions of a feature map count, by which stage 1 shares its tokens.

METEOR (arXiv 2507.20842) takes the numerical rank "from an SVD" and is silent on which: every kind
here is our reading. All of them come from one decomposition, on the host, offline.

N tokens, E encoder width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from threadpoolctl import threadpool_limits

RankMode = Literal["energy", "effective", "tolerance"]

DEFAULT_ENERGY = 0.99
NEARLY_FULL = 0.9  # share of min(N, E) from which a rank says how large a map is, and little else


@dataclass(frozen=True)
class RankKind:
    """Which singular values σ count; as text it is the kind's key in a `Calibration`.

    Attributes:
        mode: "energy" counts the fewest largest whose squares make up the share `energy` of all;
            "effective" is exp of the entropy of σ / Σ σ (Roy and Vetterli, EUSIPCO 2007);
            "tolerance" counts those above max(N, E) · eps · σ₁ with the eps of float32, the usual
            rank of a matrix, which is min(N, E) for nearly every real feature map.
        energy: the share, between 0 and 1.
    """

    mode: RankMode = "energy"
    energy: float = DEFAULT_ENERGY

    def __post_init__(self) -> None:
        if self.mode not in get_args(RankMode):
            valid = ", ".join(get_args(RankMode))
            raise ValueError(f"rank: expected one of {valid}, got {self.mode!r}.")
        if not 0 < self.energy < 1:
            raise ValueError(f"energy: expected a share between 0 and 1, got {self.energy}.")

    def __str__(self) -> str:
        return f"energy {self.energy}" if self.mode == "energy" else self.mode


ALL_KINDS = tuple(RankKind(mode) for mode in get_args(RankMode))


def numerical_ranks(
    features: np.ndarray, *, kinds: Iterable[RankKind] = ALL_KINDS
) -> dict[str, float]:
    """The rank of a feature map by kind; 0 for a map of zeros, NaN for one that is not finite.

    Shapes:
        features: float[N, E], read as float32.
    """
    features = np.asarray(features, np.float32)
    if not np.isfinite(features).all():
        return {str(kind): float("nan") for kind in kinds}
    singular = singular_values(features)
    return {str(kind): _rank(singular, kind, size=max(features.shape)) for kind in kinds}


def singular_values(features: np.ndarray) -> np.ndarray:
    """float64[min(N, E)], largest first: square roots of the Gram matrix's eigenvalues.

    The Gram matrix, of the map's smaller side, is many times as fast as an SVD of the map. It
    squares the singular values; but in float64 those down to about 1e-7 of the largest stay exact
    enough, and the tolerance, which is relative to float32, lies above that. One thread: beside
    other work BLAS's threads wait for each other ten times as long as the eigenvalues take.

    Shapes:
        features: float[N, E].
    """
    features = np.asarray(features, np.float64)
    if features.shape[0] > features.shape[1]:
        features = features.T
    with threadpool_limits(1, user_api="blas"):
        eigenvalues = np.linalg.eigvalsh(features @ features.T)
    return np.sqrt(np.maximum(eigenvalues[::-1], 0))


def _rank(singular: np.ndarray, kind: RankKind, *, size: int) -> float:
    """The rank of a map whose longer side is `size`."""
    if not singular[0] > 0:
        return 0.0
    if kind.mode == "energy":
        share = np.cumsum(singular**2) / (singular**2).sum()
        return float(min((share < kind.energy).sum() + 1, singular.size))
    if kind.mode == "effective":
        weight = singular / singular.sum()
        weight = weight[weight > 0]
        return float(np.exp(-(weight * np.log(weight)).sum()))
    return float((singular > size * np.finfo(np.float32).eps * singular[0]).sum())
