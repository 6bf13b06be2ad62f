"""How arrays are split over a mesh: path rules for parameters, and batches.

Rules for layers that many models have stand here, others with their family.

Models pin activations with `models.layers.stack.constrain`, which is in force under
`jax.set_mesh(mesh)`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from meteor_jax.models.family import ShardingRules
from meteor_jax.parallel.mesh import BATCH_AXES

# (path pattern, how the last dimensions are split); the first match wins. Dimensions in front of
# those named, such as the stacked layers, stay whole. Kernels are [in, out].
GENERIC_RULES: ShardingRules = (
    (r"(bias|scale)$", ()),
    (r"(query|key|value|qkv|gate|up|fc1|head)/kernel$", ("fsdp", "tensor")),
    (r"(out|down|fc2)/kernel$", ("tensor", "fsdp")),
    (r"embedding/embedding$", ("tensor", "fsdp")),
    (r"patch_embedding/kernel$", ("fsdp",)),
    (r"_embedding$", ("fsdp",)),
)


def parameter_spec(
    path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, *, rules: ShardingRules = ()
) -> PartitionSpec:
    """How the parameter at `path` ("llama/blocks/…") is split.

    An axis that does not divide its dimension splits the rule's other one, if that is free; else
    the dimension stays whole, so that small models run on any mesh.

    Args:
        rules: of the family; they come before the generic ones.

    Raises:
        ValueError: if no rule matches a parameter of two or more dimensions.
    """
    if len(shape) < 2:
        return PartitionSpec()
    for pattern, axes in (*rules, *GENERIC_RULES):
        if re.search(pattern, path):
            axes = axes[-len(shape) :]
            split = _split(shape[len(shape) - len(axes) :], axes, mesh)
            return PartitionSpec(*(None,) * (len(shape) - len(axes)), *split)
    raise ValueError(
        f"no sharding rule matches parameter {path} {tuple(shape)}: add one to the family's "
        "sharding_rules."
    )


def _split(
    sizes: Sequence[int], axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh
) -> tuple[str | None, ...]:
    """The axis of each dimension, None for those that stay whole."""

    def divides(axis: str | None, size: int) -> bool:
        return axis is not None and size % mesh.shape[axis] == 0

    placed = [axis if divides(axis, size) else None for axis, size in zip(axes, sizes, strict=True)]
    for axis in axes:
        if axis is None or axis in placed or mesh.shape[axis] == 1:
            continue
        for place, size in enumerate(sizes):
            free = placed[place] is None or mesh.shape[placed[place]] == 1
            if free and divides(axis, size):
                placed[place] = axis
                break
    return tuple(placed)


def parameter_shardings(tree: Any, mesh: Mesh | AbstractMesh, *, rules: ShardingRules = ()) -> Any:
    """A NamedSharding for every leaf of `tree` (arrays or ShapeDtypeStructs), by the family's
    `rules`.

    Works for anything that holds parameters under their own paths: a whole train state too.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh, rules=rules))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes of `tree` (arrays or ShapeDtypeStructs), each with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays, this process's rows of the batch, as one global array split by rows."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
