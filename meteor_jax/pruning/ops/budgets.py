"""Adaptive budgets, offline: λ, and the static totals that the rows of a batch are packed into.

Runs on the host, over the K of a calibration set. B prompts, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from meteor_jax.config import ConfigError

BATCH_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # for which edges are measured
NUM_BATCHES = 2000  # that are drawn for each
NUM_CANDIDATES = 60  # quantiles of their means that an edge may be


def fit_lambda(
    total_vav: np.ndarray, *, low_high: tuple[int, int], target: float, available: np.ndarray
) -> float:
    """λ by bisection: min(clip(round(λ · total_vav), low, high), available) is `target` on average.

    Shapes:
        total_vav: float[B]; available: int[B], the tokens of each example before the step.

    Raises:
        ConfigError: if no attention falls on the image, so that no λ can.
    """
    if not total_vav.max() > 0:
        raise ConfigError("no text attention falls on the image; is the model trained?")

    def mean(lambda_: float) -> float:
        return float(
            np.minimum(np.clip(np.round(lambda_ * total_vav), *low_high), available).mean()
        )

    low, high = 0.0, 2 * low_high[1] / total_vav[total_vav > 0].min()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < target else (low, middle)
    return float(high)


def fit_edges(
    kept: Sequence[np.ndarray], *, high: int, num_totals: int, num_shards: int = 1
) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """`Adaptive.edges` of one step: what the smaller totals hold, mean over a batch's rows.

    Batches are drawn as evaluation makes them, the questions about an image side by side, since
    these keep alike numbers and their sum varies more than that of as many others. The edges are
    those that compute the fewest tokens over these batches, plus the standard error of the mean
    of K (twice that for the last, behind which the total holds everything).

    Args:
        kept: of each image, K of its questions, int[n].
        high: the largest K that there may be.
        num_shards: of a batch; each has so many rows, and the fullest chooses for all.
    """
    rng = np.random.default_rng(0)
    means = np.array([np.mean(of_image) for of_image in kept])
    error = means.std() / np.sqrt(len(means))
    stream = np.concatenate(
        [kept[image] for image in rng.integers(len(kept), size=8 * NUM_BATCHES)]
    ).astype(np.float64)
    longest = BATCH_ROWS[-1] * num_shards
    stream = np.tile(stream, -(-longest // len(stream)))
    total = np.concatenate([[0.0], np.cumsum(stream)])
    edges = []
    for rows in BATCH_ROWS:
        starts = rng.integers(len(stream) - rows * num_shards + 1, size=(NUM_BATCHES, 1))
        starts = starts + rows * np.arange(num_shards)
        sums = (total[starts + rows] - total[starts]).max(1)
        best = _best_edges(sums / rows, high=high, count=num_totals - 1)
        edges.append(
            (
                rows,
                tuple(
                    round(float(min(edge + (2 if edge == best[-1] else 1) * error, high)), 2)
                    for edge in best
                ),
            )
        )
    return tuple(edges)


def expected_total(
    kept: Sequence[np.ndarray], *, rows: int, totals: Sequence[int], num_shards: int = 1
) -> float:
    """Visual tokens of an image that batches of `num_shards` × `rows` compute on average, each
    shard packed into the smallest of `totals` that holds every one's; batches are drawn from `kept`
    one after the other."""
    stream, size = np.concatenate(kept), rows * num_shards
    batches = np.resize(stream, -(-len(stream) // size) * size).reshape(-1, num_shards, rows)
    index = np.searchsorted(np.asarray(totals), batches.sum(2).max(1))
    return float(np.asarray(totals)[np.minimum(index, len(totals) - 1)].mean() / rows)


def _best_edges(means: np.ndarray, *, high: int, count: int) -> tuple[float, ...]:
    """At most two edges, increasing, such that batches of these means compute the least."""
    found = np.unique(np.quantile(means, np.linspace(0, 1, NUM_CANDIDATES)))
    share = (means[:, None] <= found).mean(0)
    if count == 0:
        return ()
    one = share * found + (1 - share) * high
    if count == 1:
        return (float(found[one.argmin()]),)
    # With edges i ≤ j: share_i of the batches compute edge i, those up to share_j edge j.
    two = share[:, None] * (found[:, None] - found) + one
    i, j = np.unravel_index(np.where(np.triu(np.ones_like(two)), two, np.inf).argmin(), two.shape)
    return tuple(sorted({float(found[i]), float(found[j])}))
