"""How a batch is split over a mesh: a shard is a part of its rows, with images of its own.

A host feeds the shards whose devices it has, and every host reads every answer. Without a mesh
there is one shard.

S shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meteor_jax.parallel.mesh import BATCH_AXES
from meteor_jax.types import Array

BATCH_SPEC = PartitionSpec(BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class DataShards:
    """The shards of rows on `mesh`, or the one shard where that is None."""

    mesh: Mesh | None = None

    @classmethod
    def current(cls) -> DataShards:
        """Those of the mesh that `jax.set_mesh` put in force."""
        mesh = jax.sharding.get_mesh()
        return cls(None if mesh.empty else mesh)

    @property
    def count(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES) if self.mesh else 1

    @property
    def local(self) -> tuple[int, ...]:
        """The shards that this process feeds."""
        if self.mesh is None:
            return (0,)
        sharding = NamedSharding(self.mesh, BATCH_SPEC)
        parts: dict[Any, Any] = dict(sharding.addressable_devices_indices_map((self.count,)))
        return tuple(sorted({index[0].indices(self.count)[0] for index in parts.values()}))

    def place(self, rows: Mapping[int, np.ndarray]) -> Array:
        """[S, ...], shard by shard on its devices, from the [...] of every local shard."""
        first = rows[self.local[0]]
        if self.mesh is None:
            return jnp.asarray(first[None])

        def shard(index: Any) -> np.ndarray:
            return np.stack([rows[row] for row in range(*index[0].indices(self.count))])

        sharding = NamedSharding(self.mesh, BATCH_SPEC)
        return jax.make_array_from_callback((self.count, *first.shape), sharding, shard)

    def fetch(self, tree: Any) -> Any:
        """The arrays on this host, whole."""
        return jax.device_get(self.everywhere(tree))

    def active(self) -> contextlib.AbstractContextManager:
        """The mesh in force, in whatever thread the caller is."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def everywhere(self, tree: Any) -> Any:
        """The same arrays whole on every host, so that `jax.device_get` can read them."""
        if jax.process_count() == 1 or self.mesh is None:
            return tree
        return jax.jit(_same, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)


def split_by_rows(x: Array) -> Array:
    """Keeps the first axis split by shards, on the mesh in force."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, BATCH_SPEC)


def broadcast(value: Any) -> Any:
    """Process 0's `value`, which JSON can hold, on every process."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        padded[:] = text
    return json.loads(multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes())


def _same(tree: Any) -> Any:
    return tree
