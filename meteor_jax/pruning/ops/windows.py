"""Attention windows of a grid: the order of their tokens, and how many each keeps."""

from __future__ import annotations

import numpy as np


def window_order(grid: int, window: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The patch_index places of a grid's tokens window by window, and how many are in each window.

    Windows lie from the first row and column on, so those at the far edges may be smaller.
    """
    row, column = np.divmod(np.arange(grid**2), grid)
    order = np.lexsort((column, row, column // window, row // window))
    sides = [min(window, grid - start) for start in range(0, grid, window)]
    return order, tuple(height * width for height in sides for width in sides)


def window_quotas(keep: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Shares `keep` tokens among windows in proportion to what they hold, by largest remainder;
    of equal remainders the earlier window's wins.

    Raises:
        ValueError: if `keep` is more than the windows hold.
    """
    total = sum(sizes)
    if keep > total:
        raise ValueError(
            f"cannot keep {keep} of {total} tokens; lower the plan's budget to at most {total}."
        )
    quotas = [keep * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(keep * sizes[i] % total))
    for i in by_remainder[: keep - sum(quotas)]:
        quotas[i] += 1
    return tuple(quotas)


def window_slots(sizes: tuple[int, ...], *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that lie window after window, as `length` slots a window, the spare ones last.

    Shapes:
        returns: int[W, length], which token is in each slot (any, in a spare one), and
            bool[W, length], False for a spare slot.
    """
    place = np.arange(length)
    counts = np.asarray(sizes)[:, None]
    token = np.cumsum(counts, axis=0) - counts + place
    return np.minimum(token, counts.sum() - 1), place < counts
