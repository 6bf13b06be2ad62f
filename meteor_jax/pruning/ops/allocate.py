"""Sharing a number of tokens among encoders, on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

Assignment = Literal["rank", "uniform", "inverse_rank", "tokens"]


def allocate(
    keep_total: int,
    *,
    ranks: Mapping[str, float],
    available: Mapping[str, int],
    assignment: Assignment = "rank",
    multiple_of: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Shares the tokens of one boundary among the encoders: k^l = k · r^l / Σ r.

    An encoder never gets more than it has; what is over goes to the others by the same rule.
    Fractions are settled by largest remainder, so the counts sum to `keep_total` exactly. Where the
    total allows, an encoder keeps one token at least (one of each window), however low its rank.

    Args:
        keep_total: tokens over all encoders that stay.
        ranks: by encoder, the numerical rank of its features.
        available: by encoder, the tokens that it has at this boundary.
        assignment: weights by rank, equal weights, weights by 1 / rank, or by available tokens.
        multiple_of: by encoder, what its count must be a multiple of (the number of its attention
            windows); 1 where absent.

    Raises:
        ValueError: if the encoders do not have `keep_total` tokens, or multiples cannot meet it.
    """
    if assignment not in get_args(Assignment):
        valid = ", ".join(get_args(Assignment))
        raise ValueError(f"assignment: expected one of {valid}, got {assignment!r}.")
    if assignment == "uniform":
        weights = dict.fromkeys(available, 1.0)
    elif assignment == "tokens":
        weights = {name: float(count) for name, count in available.items()}
    else:
        missing = sorted(set(available) - set(ranks))
        if missing:
            raise ValueError(
                f"ranks: none for {', '.join(missing)}; calibrate, or assign uniformly."
            )
        low = [name for name in available if not ranks[name] > 0]
        if low:
            raise ValueError(f"ranks: expected more than 0 for {', '.join(low)}.")
        power = 1.0 if assignment == "rank" else -1.0
        weights = {name: ranks[name] ** power for name in available}
    if not 0 <= keep_total <= sum(available.values()):
        raise ValueError(
            f"expected to keep between 0 and {sum(available.values())} tokens, which the encoders "
            f"have at this boundary, got {keep_total}; lower the budget."
        )
    step = {name: (multiple_of or {}).get(name, 1) for name in available}
    counts: dict[str, int] = {}
    open_caps = dict(available)
    # Coarse steps are settled first; those that can take any number absorb the rounding.
    for name in sorted((n for n in available if step[n] > 1), key=lambda n: -step[n]):
        left = keep_total - sum(counts.values())
        wanted = _fill(left, weights, open_caps)[name]
        others = sum(cap for other, cap in open_caps.items() if other != name)
        least = max(math.ceil((left - others) / step[name]), 1)
        most = min(open_caps.pop(name), left) // step[name]
        counts[name] = step[name] * min(max(round(wanted / step[name]), least), most)
    left = keep_total - sum(counts.values())
    if left > sum(open_caps.values()):
        raise ValueError(
            f"{keep_total} tokens cannot be met in multiples of "
            f"{', '.join(f'{step[n]} ({n})' for n in counts)}; change the budget by {left}."
        )
    shares = _fill(left, weights, open_caps)
    counts |= {name: math.floor(share) for name, share in shares.items()}
    by_remainder = sorted(
        (name for name in shares if counts[name] < open_caps[name]),
        key=lambda name: counts[name] - shares[name],
    )
    for name in by_remainder[: keep_total - sum(counts.values())]:
        counts[name] += 1
    for name in [name for name in shares if not counts[name]]:
        most = max(shares, key=counts.__getitem__)
        if counts[most] > 1:
            counts[name], counts[most] = 1, counts[most] - 1
    return {name: counts[name] for name in available}


def _fill(total: int, weights: Mapping[str, float], caps: Mapping[str, int]) -> dict[str, float]:
    """Real-valued shares of `total` in proportion to `weights`, none above its cap."""
    shares: dict[str, float] = {}
    active = dict(caps)
    while active:
        left = total - sum(shares.values())
        weight = sum(weights[name] for name in active)
        wanted = {name: left * weights[name] / weight for name in active}
        full = [name for name in active if wanted[name] >= active[name]]
        if not full:
            return shares | wanted
        shares |= {name: active.pop(name) for name in full}
    return shares
