"""A range of the decoder's layers over packed rows, of equal or of unequal length.

B rows, S entries.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from meteor_jax.models.decoders.llama.caches import LayerRange
from meteor_jax.models.decoders.llama.model import Llama, rope_freqs
from meteor_jax.models.layers.ragged import RaggedLayout, num_row_shards
from meteor_jax.types import Array, Sequence


def run_layers(
    llama: Llama, variables: Any, sequence: Sequence, *, start: int, stop: int
) -> LayerRange:
    """Layers `[start, stop)`, every row by itself."""
    out = llama.apply(
        variables,
        sequence.x,
        sequence.position,
        start=start,
        stop=stop,
        segment_ids=sequence.segment_ids,
        method="run",
    )
    k, v = out.extras
    return LayerRange(sequence.replace(x=out.x), last_input=out.last_input, k=k, v=v)


def run_rows(
    llama: Llama,
    variables: Any,
    sequence: Sequence,
    *,
    num_kept: Array,
    totals: tuple[int, ...],
    num_text: int,
    start: int,
    stop: int,
) -> tuple[LayerRange, Array]:
    """Layers `[start, stop)` over packed rows, over the smallest total that holds them.

    Args:
        num_kept: int32[B], visual tokens of every row.
        totals: static numbers of visual tokens of a shard's rows together, increasing; the last
            holds any.
        num_text: text places of a row.

    Returns:
        The layers' result, and float32[B]: visual tokens computed, a row's share of the total.
    """
    num_shards = num_row_shards(num_kept.shape[0])
    rows = num_kept.shape[0] // num_shards
    # The first total that no shard's rows exceed together: the same on all shards, because the
    # branches gather parameters.
    needed = num_kept.reshape(num_shards, -1).sum(1).max()
    index = (needed > jnp.asarray(totals[:-1], jnp.int32)).sum()
    after = _run_packed(
        llama,
        variables,
        sequence,
        start=start,
        stop=stop,
        index=index,
        num_buffers=num_shards,
        sizes=tuple(rows * num_text + total for total in totals),
    )
    computed = jnp.asarray(totals, jnp.float32)[index] / rows
    return after, jnp.broadcast_to(computed, num_kept.shape)


def _run_packed(
    llama: Llama,
    variables: Any,
    sequence: Sequence,
    *,
    start: int,
    stop: int,
    index: Array,
    sizes: tuple[int, ...],
    num_buffers: int,
) -> LayerRange:
    """Layers `[start, stop)`, the rows in buffers of `sizes[index]` entries, which hold them."""
    batch, longest = sequence.valid.shape
    if len(sizes) == 1:
        return run_layers(llama, variables, sequence, start=start, stop=stop)
    layout, x, position = None, sequence.x, sequence.position  # the same for all sizes
    if batch > num_buffers:  # else a row is its buffer
        layout = RaggedLayout.pack(sequence.valid.sum(1), longest=longest, num_buffers=num_buffers)
        x, position = layout.to_buffers(x), layout.to_buffers(position)

    cos, sin = rope_freqs(position, config=llama.config)

    def run(size: int) -> tuple[Array, ...]:
        size = min(size, x.shape[1])
        with jax.named_scope(f"entries_{size}"):
            out = llama.apply(
                variables,
                x[:, :size],
                (cos[:, :size], sin[:, :size]),
                start=start,
                stop=stop,
                layout=layout and layout.shrink(size),
                method="run",
            )
        k, v = out.extras
        states = (_pad(array, x.shape[1], axis=1) for array in (out.x, out.last_input))
        return *states, _pad(k, longest, axis=2), _pad(v, longest, axis=2)

    x, last_input, k, v = jax.lax.switch(index, [lambda size=size: run(size) for size in sizes])
    if layout is not None:
        x, last_input = layout.to_rows(x), layout.to_rows(last_input)
    return LayerRange(sequence.replace(x=x), last_input=last_input, k=k, v=v)


def _pad(array: Array, length: int, *, axis: int) -> Array:
    widths = [(0, length - array.shape[i] if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths)
