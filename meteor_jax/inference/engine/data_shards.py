"""How a batch is shared out: a lane is one shard of its rows, with images of its own.

A host feeds the lanes whose devices it has, and every host reads every answer. Off a mesh there is
one lane.

S lanes.
"""

from __future__ import annotations

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

ROWS = PartitionSpec(BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """The lanes of `mesh`, or the one lane where that is None."""

    mesh: Mesh | None = None

    @classmethod
    def in_force(cls) -> Lanes:
        """Those of the mesh that `jax.set_mesh` put in force."""
        mesh = jax.sharding.get_mesh()
        return cls(None if mesh.empty else mesh)

    @property
    def count(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES) if self.mesh else 1

    @property
    def local(self) -> tuple[int, ...]:
        """The lanes that this process feeds."""
        if self.mesh is None:
            return (0,)
        parts = NamedSharding(self.mesh, ROWS).addressable_devices_indices_map((self.count,))
        return tuple(sorted({index[0].indices(self.count)[0] for index in parts.values()}))

    def place(self, rows: Mapping[int, np.ndarray]) -> Array:
        """[S, ...], lane by lane on its devices, from the [...] of every local lane."""
        first = rows[self.local[0]]
        if self.mesh is None:
            return jnp.asarray(first[None])

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return np.stack([rows[lane] for lane in range(*index[0].indices(self.count))])

        sharding = NamedSharding(self.mesh, ROWS)
        return jax.make_array_from_callback((self.count, *first.shape), sharding, shard)

    def everywhere(self, tree: Any) -> Any:
        """The same arrays whole on every host, so that `jax.device_get` can read them."""
        if jax.process_count() == 1:
            return tree
        return jax.jit(_same, out_shardings=NamedSharding(self.mesh, PartitionSpec()))(tree)


def split_by_rows(x: Array) -> Array:
    """Keeps the first axis split by lanes, on the mesh in force."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, ROWS)


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
