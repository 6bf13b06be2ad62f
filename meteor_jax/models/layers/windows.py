"""Attention inside windows of a grid: the tokens of one window see each other alone.

Tokens lie window after window (see `pruning.ops.windows.window_order`), so a window is a stretch of
them, and a block that attends over the whole grid has one window.

I images, N tokens, W windows, S slots of a window, H heads, d head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from meteor_jax.models.layers.attention import attend, attention_received, select_kernel
from meteor_jax.pruning.ops.windows import window_slots
from meteor_jax.types import Array

LONG = 2048  # windows with more slots than this attend a chunk of queries at a time
CHUNK = 512  # queries in such a chunk


def contiguous_runs(
    start: int, stop: int, *, global_blocks: Sequence[int]
) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether global) of the longest runs of equal blocks; one, empty, for none."""
    blocks = range(start, stop)
    if not blocks:
        yield start, stop, start in global_blocks
    for is_global, run in itertools.groupby(blocks, key=lambda block: block in global_blocks):
        run = list(run)
        yield run[0], run[-1] + 1, is_global


def to_windows(x: Array, *, sizes: tuple[int, ...], length: int) -> Array:
    """float[I, N, ...] → float[I, W, length, ...], zeros in the spare slots."""
    if set(sizes) == {length}:
        return x.reshape(x.shape[0], len(sizes), length, *x.shape[2:])
    slots, real = window_slots(sizes, length=length)
    real = real.reshape(*real.shape, *(1,) * (x.ndim - 2))
    return jnp.where(real, x[:, slots], 0)


def from_windows(x: Array, *, sizes: tuple[int, ...]) -> Array:
    """float[I, W, S, ...] → float[I, N, ...]: what `to_windows` gave, without the spare slots."""
    _, real = window_slots(sizes, length=x.shape[2])
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return x if real.all() else x[:, real.reshape(-1).nonzero()[0]]


def attend_windows(
    q: Array, k: Array, v: Array, *, real: Array | None = None, scale: float | None = None
) -> Array:
    """`attend` inside each window. Where XLA computes it, a long window's map is never whole, in
    the backward pass neither: each chunk of its queries is computed again there.

    Shapes:
        q, k, v: float[I, W, S, H, d]; v may have another d.
        real: bool[W, S]; False for slots that nobody looks at.
        returns: float[I, W, S, H, d].
    """
    shape = v.shape
    mask = None if real is None else jnp.tile(real, (shape[0], 1))[:, None]
    q, k, v = (array.reshape(-1, *array.shape[2:]) for array in (q, k, v))
    if shape[2] <= LONG or select_kernel(q, k, v, mask=mask) != "xla":
        return attend(q, k, v, mask=mask, scale=scale).reshape(shape)

    def rows(q: Array) -> Array:
        return attend(q, k, v, mask=mask, scale=scale)

    whole = shape[2] // CHUNK * CHUNK
    chunks = q[:, :whole].reshape(q.shape[0], -1, CHUNK, *q.shape[2:]).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(rows, prevent_cse=False), chunks)
    out = out.swapaxes(0, 1).reshape(q.shape[0], whole, *shape[3:])
    if whole < shape[2]:
        out = jnp.concatenate([out, rows(q[:, whole:])], axis=1)
    return out.reshape(shape)


def received_in_windows(
    q: Array,
    k: Array,
    *,
    rows: Array | None = None,
    real: Array | None = None,
    scale: float | None = None,
) -> Array:
    """The attention that each slot gets inside its window, mean over heads and queries.

    Shapes:
        q, k: float[I, W, S, H, d].
        rows: bool[W, S]; the queries that count (default: all).
        real: bool[W, S]; False for slots that nobody looks at.
        returns: float32[I, W, S].
    """
    shape = q.shape[:3]
    mask = None
    if real is not None:
        mask = jnp.broadcast_to(real[:, None], (*shape, shape[2])).reshape(-1, shape[2], shape[2])
    q, k = (array.reshape(-1, *array.shape[2:]) for array in (q, k))
    weight = jnp.ones(q.shape[:2]) if rows is None else jnp.tile(rows, (shape[0], 1))
    received = attention_received(q, k, row_weight=weight, mask=mask, scale=scale)
    return received.mean(1).reshape(shape)
