"""Rows of unequal length, one after the other in flat buffers of a static size.

What works entry by entry (norms, projections, MLPs) runs on the buffers, and costs what the rows
hold together; attention gathers its rows out of them. The buffers of a batch are as many as the
mesh has shards of rows, so that no entry leaves its device.

B rows, L entries of the longest row, G buffers, R = B / G rows of a buffer, F entries of a buffer.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from meteor_jax.types import Array


class RaggedLayout(flax.struct.PyTreeNode):
    """Where the entries of B rows lie.

    Shapes:
        place: int32[G, R·L]; an entry's place in its buffer; any, past its row's end.
        held: bool[G, R·L]; whether a row has that entry.
        entry: int32[G, F]; the entry at a place, counted over the buffer's rows; any, past the
            last row's end.
        longest: L (static).
    """

    place: Array
    held: Array
    entry: Array
    longest: int = flax.struct.field(pytree_node=False)

    @classmethod
    def pack(cls, lengths: Array, *, longest: int, num_buffers: int) -> RaggedLayout:
        """Rows of `lengths` (int32[B], at most `longest`) in buffers that hold any: F = R·L."""
        lengths = lengths.reshape(num_buffers, -1, 1)
        num_rows = lengths.shape[1]
        starts = jnp.cumsum(lengths, axis=1) - lengths
        column = jnp.arange(longest)
        held = column < lengths
        at = jnp.arange(num_rows * longest)
        row = (starts + lengths <= at).sum(1)  # that the place is in: all those before have ended
        row = jnp.minimum(row, num_rows - 1)
        column_at = jnp.minimum(at - jnp.take_along_axis(starts[:, :, 0], row, axis=1), longest - 1)
        return cls(
            place=jnp.where(held, starts + column, 0).reshape(num_buffers, -1),
            held=held.reshape(num_buffers, -1),
            entry=row * longest + column_at,
            longest=longest,
        )

    def shrink(self, size: int) -> RaggedLayout:
        """The same rows in buffers of `size` entries, which must hold them."""
        return self.replace(entry=self.entry[:, :size])

    def to_buffers(self, rows: Array) -> Array:
        """[G, F, ...] of [B, L, ...]."""
        return _take(rows.reshape(len(self.entry), -1, *rows.shape[2:]), self.entry)

    def to_rows(self, buffers: Array) -> Array:
        """[B, L, ...] of [G, F, ...]; zeros past a row's end, where the next row's entries would
        be, so that one which is not finite stays alone."""
        held = self.held.reshape(*self.held.shape, *(1,) * (buffers.ndim - 2))
        rows = jnp.where(held, _take(buffers, self.place), 0)
        return rows.reshape(-1, self.longest, *buffers.shape[2:])


def _take(array: Array, index: Array) -> Array:
    """[G, N, ...] of [G, M, ...] at int32[G, N], below M."""
    index = index.reshape(*index.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, index, axis=1, mode="promise_in_bounds")


def num_row_shards(batch: int) -> int:
    """Over how many shards the mesh in force splits `batch` rows; 1 where it does not."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:  # the rows here are a shard's own
        return 1
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    return 1 if batch % shards else shards
