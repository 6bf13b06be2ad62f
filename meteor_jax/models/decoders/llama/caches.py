"""From what a range of layers computed to the cache that its new tokens read.

B rows, S entries, T new tokens, L layers of a range.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp

from meteor_jax.models.layers.stack import constrain
from meteor_jax.types import Array, DecodeCache, RangeCache, Sequence


class LayerRange(flax.struct.PyTreeNode):
    """What the layers between two steps give: `last_input` is the last one's, float[B, S, D]; k and
    v are float[L, B, S, heads, d]."""

    sequence: Sequence
    last_input: Array
    k: Array
    v: Array


class HeldRange(flax.struct.PyTreeNode):
    """The keys and values of a range of layers, on their way to a cache.

    Shapes:
        k, v: float[L, B, S, heads, d]; valid: bool[B, S].
        next_position: int32[B]; rotary position of the first new token.
        entries: int32[B, S'] or None; which of the S each entry of the row that runs now was.
        lengths: see `RangeCache` (static).
    """

    k: Array
    v: Array
    valid: Array
    next_position: Array
    entries: Array | None
    lengths: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, layers: LayerRange, *, row: Sequence, lengths: set[int]) -> HeldRange:
        """Args:
        row: whose last position the new tokens follow.
        """
        last = jnp.maximum(row.valid.sum(1) - 1, 0)[:, None]
        return cls(
            k=layers.k,
            v=layers.v,
            valid=layers.sequence.valid,
            next_position=jnp.take_along_axis(row.position, last, axis=1)[:, 0] + 1,
            entries=None,
            lengths=tuple(sorted({min(length, layers.k.shape[2]) for length in lengths})),
        )

    def follow(self, idx: Array) -> HeldRange:
        """After a step that left the entries `idx` (int32[B, S'']) of the row."""
        entries = idx
        if self.entries is not None:
            entries = jnp.take_along_axis(self.entries, idx, axis=1)
        return self.replace(entries=entries)

    def cut(self, valid: Array, *, lengths: tuple[int, ...]) -> HeldRange:
        """With the entries alone that the row still has, of which bool[B, S''] are `valid`."""
        assert self.entries is not None  # `follow` comes first
        idx = self.entries[None, :, :, None, None]

        def take(array: Array) -> Array:
            return jnp.take_along_axis(array, idx, axis=2, mode="promise_in_bounds")

        return self.replace(
            k=take(self.k), v=take(self.v), valid=valid, entries=None, lengths=lengths
        )

    def cache(self, *, capacity: int) -> RangeCache:
        """The keys and values, and room for `capacity` new tokens behind them."""
        room: Any = ((0, 0), (0, 0), (0, capacity), (0, 0), (0, 0))
        return RangeCache(
            k=jnp.pad(self.k, room),
            v=jnp.pad(self.v, room),
            valid=jnp.pad(self.valid, ((0, 0), (0, capacity))),
            next_position=self.next_position,
            decode_capacity=capacity,
            lengths=self.lengths,
        )


def new_position(cache: RangeCache, cache_index: Array, *, count: int) -> Array:
    """int32[B, T]: rotary positions of the next `count` tokens in a range of layers."""
    return cache.next_position[:, None] + cache_index + jnp.arange(count)


def pin_cache(cache: DecodeCache) -> DecodeCache:
    """`cache` by rows and kv heads, so that it stays where it is from one program to the next."""
    return cache.replace(
        ranges=tuple(
            layers.replace(
                k=constrain(layers.k, "lbshd"),
                v=constrain(layers.v, "lbshd"),
                valid=constrain(layers.valid, "bs"),
            )
            for layers in cache.ranges
        )
    )
