"""Stage 1: dropping tokens inside the encoders, and how many each encoder may keep.

The depth of an encoder is divided into three segments, and tokens are dropped at the end of each.
Every score is a float32 per token, the largest stay, and no gradient flows through it. How METEOR
(arXiv 2507.20842) is read where it is silent stands with each function.

I images, N tokens, K kept tokens, E encoder width, H heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from meteor_jax.pruning.ops.diversity import finite_tokens, merge_rest
from meteor_jax.pruning.ops.select import keep_topk
from meteor_jax.pruning.ops.windows import window_order, window_quotas, window_slots
from meteor_jax.types import Array

NUM_SEGMENTS = 3

Criterion = Literal["mean_token", "attention", "cls", "random", "uniform"]
Assignment = Literal["rank", "uniform", "inverse_rank", "tokens"]


@dataclass(frozen=True)
class EncoderCut:
    """What one boundary does to one encoder.

    Attributes:
        keep: tokens of an image that stay.
        criterion: "mean_token" drops the tokens most like their mean; "attention" drops those that
            get the least attention from all queries of the segment's last block; "cls" likewise,
            from the CLS token alone; "random" draws places by the image, so that its tokens do
            not depend on its batch mates; "uniform" keeps an even stride.
        seed: of "random"; what differs from cut to cut of a plan (`EncodePlan.encoder_cuts`).
        merged: how many of the `keep` gather what is dropped (see `diversity.merge_rest`); then
            attention windows have no quotas, so it is for an encoder's output.
    """

    keep: int
    criterion: Criterion = "mean_token"
    seed: int = 0
    merged: int = 0

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep: expected at least 1 token, got {self.keep}.")
        if not 0 <= self.merged < self.keep:
            raise ValueError(
                f"merged: expected between 0 and {self.keep - 1} of keep={self.keep} tokens, got "
                f"{self.merged}."
            )
        if self.criterion not in get_args(Criterion):
            valid = ", ".join(get_args(Criterion))
            raise ValueError(f"criterion: expected one of {valid}, got {self.criterion!r}.")


@flax.struct.dataclass
class EncoderOutput:
    """The tokens of one encoder.

    Shapes:
        x: float[I, N, E].
        raster: int32[I, N]; row-major place of each token in the encoder's own output grid.
        kept: int32[I, K] a boundary: the tokens alive after it, in the same numbering; empty where
            the encoder ran without cuts.
        features: float[I, K, E] a boundary: what those tokens held there; empty without cuts. Its E
            is that of the blocks.
    """

    x: Array
    raster: Array
    kept: tuple[Array, ...] = ()
    features: tuple[Array, ...] = ()


@flax.struct.dataclass
class EncoderState:
    """An encoder's tokens between two blocks.

    Shapes:
        x: float[I, P + N, E]; the first P (a CLS) are never cut and do not come out.
        raster: int32[I, N]; as in `EncoderOutput`.
        window_sizes: how many of the N are in each attention window, window after window
            (static); one number where the encoder has no windows.
    """

    x: Array
    raster: Array
    window_sizes: tuple[int, ...] = flax.struct.field(pytree_node=False)


def encode_segments(
    x: Array,
    *,
    cuts: tuple[EncoderCut, ...] | None,
    bounds: tuple[int, ...],
    run: Callable[[EncoderState, int, int], Any],
    attention: Callable[[int, EncoderState, str], Array],
    num_prefix: int = 0,
    window: int | None = None,
    image_seed: Array | None = None,
) -> EncoderOutput:
    """Runs blocks segment by segment and cuts at the end of each.

    With a `window`, the blocks see the tokens window by window, in raster order inside each; what
    comes out is in raster order again.

    Args:
        x: float[I, P + N, E], in raster order; the first `num_prefix` = P tokens (a CLS) are never
            cut and do not come out.
        cuts: one a segment, or None to run all blocks at once.
        bounds: the block at which each segment ends.
        run: (tokens, start, stop) → what those blocks give: `x`, and `last_input`, the input of
            the last of them.
        attention: (block, tokens at its input, criterion) → float32[I, N], the attention that the
            tokens receive there. A segment without blocks, in an encoder of fewer blocks than
            segments, asks the next block.
        window: side of an attention window of an encoder that has such; P must be 0.
        image_seed: as in `cut_tokens`.

    Raises:
        ValueError: if there is not one cut a segment, or a cut keeps more than there is.
    """
    num_tokens = x.shape[1] - num_prefix
    order, sizes = np.arange(num_tokens), (num_tokens,)
    if window is not None:
        order, sizes = window_order(math.isqrt(num_tokens), window)
        x = x[:, order]
    raster = jnp.broadcast_to(jnp.asarray(order, jnp.int32), (x.shape[0], num_tokens))
    tokens = EncoderState(x=x, raster=raster, window_sizes=sizes)
    if cuts is None:
        tokens = tokens.replace(x=run(tokens, 0, bounds[-1]).x)
        x, raster = _in_raster_order(tokens, num_prefix=num_prefix)
        return EncoderOutput(x=x, raster=raster)
    check_cuts(cuts)
    start, boundaries = 0, []
    for cut, stop in zip(cuts, bounds, strict=True):
        out = run(tokens, start, stop)
        block = min(max(start, stop - 1), bounds[-1] - 1)
        seen = tokens.replace(x=out.last_input)
        received = functools.partial(attention, block, seen, cut.criterion)
        x, raster = cut_tokens(
            out.x[:, num_prefix:],
            tokens.raster,
            cut=cut,
            attention=received,
            window_sizes=sizes,
            image_seed=image_seed,
        )
        sizes = window_quotas(x.shape[1], sizes)
        if num_prefix:
            x = jnp.concatenate([out.x[:, :num_prefix], x], axis=1)
        tokens = EncoderState(x=x, raster=raster, window_sizes=sizes)
        boundaries.append(_in_raster_order(tokens, num_prefix=num_prefix))
        start = stop
    features, kept = zip(*boundaries, strict=True)
    return EncoderOutput(x=features[-1], raster=kept[-1], kept=kept, features=features)


def _in_raster_order(tokens: EncoderState, *, num_prefix: int) -> tuple[Array, Array]:
    x, raster = tokens.x[:, num_prefix:], tokens.raster
    if len(tokens.window_sizes) == 1:
        return x, raster
    return _take(x, raster, jnp.argsort(raster, axis=1))


def check_cuts(cuts: tuple[EncoderCut, ...]) -> None:
    """Raises ValueError unless there is one cut a segment."""
    if len(cuts) != NUM_SEGMENTS:
        raise ValueError(f"cuts: expected {NUM_SEGMENTS}, one a segment, got {len(cuts)}.")


@jax.named_scope("scores")
def cut_tokens(
    x: Array,
    raster: Array,
    *,
    cut: EncoderCut,
    attention: Callable[[], Array] | None = None,
    window_sizes: tuple[int, ...] | None = None,
    image_seed: Array | None = None,
) -> tuple[Array, Array]:
    """Keeps the `cut.keep` tokens with the largest scores, in the order in which they came.

    Where the tokens lie in windows, one after the other, each keeps a quota that is fixed by its
    size, so that every shape is static (METEOR is silent on windows: our reading).

    Shapes:
        x: float[I, N, E]; raster: int32[I, N].
        attention: called only where the criterion needs it, returns float[I, N].
        image_seed: uint32[I], a hash of each image, which "random" needs.
        returns: float[I, K, E] and int32[I, K]; the inputs themselves where K = N.

    Raises:
        ValueError: if K > N, or the criterion needs attention or a seed and there is none.
    """
    num_tokens = x.shape[1]
    if cut.keep == num_tokens:
        return x, raster
    sizes = window_sizes or (num_tokens,)
    quotas = window_quotas(cut.keep, sizes)
    scores = _score(x, cut, attention, sizes=sizes, quotas=quotas, image_seed=image_seed)
    scores = jax.lax.stop_gradient(scores)
    if cut.merged:
        x, idx = merge_rest(x, scores, keep=cut.keep, merged=cut.merged)
        return x, jnp.take_along_axis(raster, idx, axis=1)
    return _take(x, raster, _keep_in_windows(scores, sizes=sizes, quotas=quotas))


def _take(x: Array, raster: Array, idx: Array) -> tuple[Array, Array]:
    """float[I, K, E] and int32[I, K] at int32[I, K] of places that there are."""
    take = functools.partial(jnp.take_along_axis, axis=1, mode="promise_in_bounds")
    return take(x, idx[..., None]), take(raster, idx)


def _keep_in_windows(scores: Array, *, sizes: tuple[int, ...], quotas: tuple[int, ...]) -> Array:
    """int32[I, K]: the places of each window's `quotas` largest of float[I, N]."""
    if len(sizes) == 1:
        return keep_topk(scores, keep=quotas[0]).idx
    slots, real = window_slots(sizes, length=max(sizes))
    scores = scores[:, slots]
    selection = keep_topk(
        scores,
        keep=max(quotas),
        valid=jnp.broadcast_to(real, scores.shape),
        num_keep=jnp.broadcast_to(jnp.asarray(quotas), scores.shape[:2]),
    )
    idx = selection.idx + slots[:, :1]
    # How many of a window's places are filled is known, so the gaps go without a mask.
    filled = np.flatnonzero(np.arange(max(quotas)) < np.asarray(quotas)[:, None])
    return idx.reshape(idx.shape[0], -1)[:, filled]


def _score(
    x: Array,
    cut: EncoderCut,
    attention: Callable[[], Array] | None,
    *,
    sizes: tuple[int, ...],
    quotas: tuple[int, ...],
    image_seed: Array | None,
) -> Array:
    num_images, num_tokens, _ = x.shape
    if cut.criterion == "mean_token":
        return -mean_token_similarity(x)
    if cut.criterion in ("attention", "cls"):
        if attention is None:
            raise ValueError(
                f"criterion {cut.criterion!r} needs attention, which this encoder lacks; "
                "use 'mean_token', 'random' or 'uniform'."
            )
        return attention()
    if cut.criterion == "random":
        if image_seed is None:
            raise ValueError("criterion 'random' draws by the image and needs image_seed.")
        return random_scores(image_seed, seed=cut.seed, num_tokens=num_tokens)
    # "uniform": the middles of as many equal contiguous_runs as are kept, window by window.
    starts = np.cumsum(sizes) - sizes
    places = np.concatenate(
        [
            start + (2 * np.arange(quota) + 1) * size // (2 * quota)
            for start, size, quota in zip(starts, sizes, quotas, strict=True)
        ]
    )
    return jnp.broadcast_to(jnp.zeros(num_tokens).at[places].set(1.0), (num_images, num_tokens))


def random_scores(image_seed: Array, *, seed: int, num_tokens: int) -> Array:
    """float32[I, N]: a draw that depends on uint32[I], a hash of each image, and on `seed` alone,
    never on what else is in the batch."""
    key = jax.random.key(seed)

    def draw(image: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, image), (num_tokens,))

    return jax.vmap(draw)(image_seed)


def mean_token_similarity(x: Array) -> Array:
    """Redundancy of each token: its cosine with the mean of the image's tokens.

    The mean token carries what the tokens share, mostly background.

    Shapes:
        x: float[I, N, E].
        returns: float32[I, N] in [−1, 1]; 0 for a token, or a mean, that is all zeros; infinity
            for a token that is not finite, which the mean leaves out.
    """
    x = x.astype(jnp.float32)
    finite = finite_tokens(x)
    # Their sum over N is as good as their mean: a cosine does not see its length.
    mean = jnp.where(finite[..., None], x, 0).mean(axis=-2, keepdims=True)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(mean, axis=-1)
    similarity = (x * mean).sum(-1) / jnp.maximum(norms, 1e-12)
    return jnp.where(finite, similarity, jnp.inf)


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
