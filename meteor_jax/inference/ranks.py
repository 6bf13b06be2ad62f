"""Measures the feature ranks that stage 1 shares its tokens by.

I images, N tokens, E encoder width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from meteor_jax.parallel.distributed import sum_over_processes
from meteor_jax.parallel.mesh import BATCH_AXES
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.ops.ranks import ALL_KINDS, NEARLY_FULL, numerical_ranks
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.points import NUM_SEGMENTS
from meteor_jax.types import Array

NUM_IMAGES = 8

Ranks = dict[str, dict[str, tuple[float, ...]]]  # see `Calibration.ranks`


def calibrate_ranks(
    model: nn.Module, params: Any, images: np.ndarray, *, plans: Iterable[PrunePlan] = ()
) -> Ranks:
    """The rank of each encoder's features at each boundary, mean over `NUM_IMAGES` of `images`.

    The three kinds at their defaults are measured, and those that `plans` ask for. The features
    are in float32, whatever the model computes in: a rank must not count what rounding adds.

    With many processes each of them calls this with the same arguments, and decomposes the
    features of its share of the images, the only ones that it reads.

    Shapes:
        images: uint8[I, H, W, 3]; evenly spread ones of them are taken, because the rank hardly
            varies from image to image (METEOR).

    Raises:
        ValueError: if features are not finite.
    """
    asked = (kind for plan in plans for kind in plan.rank_kinds)
    kinds = tuple({str(kind): kind for kind in (*ALL_KINDS, *asked)}.values())
    chosen = np.unique(np.linspace(0, len(images) - 1, NUM_IMAGES).round().astype(int))
    totals = {name: np.zeros((NUM_SEGMENTS, len(kinds))) for name in model.config.encoders}
    for features in _own_features(model, params, np.asarray(images)[chosen]):
        for name, boundaries in features.items():
            for boundary, x in enumerate(boundaries):
                totals[name][boundary] += list(numerical_ranks(x, kinds=kinds).values())
    means = {name: sum_over_processes(total) / len(chosen) for name, total in totals.items()}
    broken = [name for name, mean in means.items() if not np.isfinite(mean).all()]
    if broken:
        raise ValueError(
            f"the features of {', '.join(broken)} are not all finite, so they have no rank; is the "
            "checkpoint sound?"
        )
    return {
        str(kind): {name: tuple(mean[:, column].tolist()) for name, mean in means.items()}
        for column, kind in enumerate(kinds)
    }


def _own_features(
    model: nn.Module, params: Any, images: np.ndarray
) -> Iterator[dict[str, tuple[np.ndarray, ...]]]:
    """The features float32[N, E] at each boundary, by encoder, of every image of this process.

    All processes must take all that this gives: they compute together, one image a shard of rows.
    """
    mesh = jax.sharding.get_mesh()
    sharding, readers = None, {0: [jax.process_index()]}
    if not mesh.empty:
        sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        readers = _processes_of_rows(sharding)
    exact = model.clone(config=dataclasses.replace(model.config, dtype="float32"))
    features_of = jax.jit(
        functools.partial(exact.apply, method="segment_features"), out_shardings=sharding
    )
    for turn, start in enumerate(range(0, len(images), len(readers))):
        # Shards beyond the last image repeat it, and nobody reads them.
        rows = np.minimum(np.arange(start, start + len(readers)), len(images) - 1)
        with jax.default_matmul_precision("float32"):
            features = features_of({"params": params}, _place(images[rows], sharding))
        for row, processes in readers.items():
            reader = processes[(turn + row) % len(processes)]
            if start + row < len(images) and reader == jax.process_index():
                yield jax.tree.map(functools.partial(_row, row=row), features)


def _processes_of_rows(sharding: NamedSharding) -> dict[int, list[int]]:
    """By shard of rows the processes that have it, more than one where `tensor` spans them."""
    shards = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)
    processes: dict[int, set[int]] = {row: set() for row in range(shards)}
    for device, (part,) in sharding.devices_indices_map((shards,)).items():
        processes[part.indices(shards)[0]].add(device.process_index)
    return {row: sorted(some) for row, some in processes.items()}


def _row(x: Array, *, row: int) -> np.ndarray:
    """Row `row`, a shard of its own that this process has."""
    shards = x.addressable_shards
    shard = next(shard for shard in shards if shard.index[0].indices(x.shape[0])[0] == row)
    return np.asarray(shard.data)[0]


def _place(rows: np.ndarray, sharding: NamedSharding | None) -> Array:
    """`rows`, which every process has whole, split by `sharding`."""
    if sharding is None:
        return jnp.asarray(rows)
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])


def feature_shapes(model: nn.Module, params: Any) -> dict[str, tuple[int, int]]:
    """(N, E) of each encoder's features where nothing is dropped; nothing is computed."""
    mesh, size = jax.sharding.get_mesh(), model.config.image_size
    rows = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    images = jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8)
    features = jax.eval_shape(
        functools.partial(model.apply, method="segment_features"), {"params": params}, images
    )
    return {name: boundaries[0].shape[1:] for name, boundaries in features.items()}


def full_rank_warnings(
    plans: Iterable[PrunePlan], *, calibration: Calibration, shapes: Mapping[str, tuple[int, int]]
) -> tuple[str, ...]:
    """A line for every kind of rank that plans go by and that says nothing but a map's size.

    Args:
        shapes: (N, E) by encoder; see `feature_shapes`.
    """
    by_kind: dict[str, list[PrunePlan]] = {}
    for plan in plans:
        for rank_kind in plan.rank_kinds:
            by_kind.setdefault(str(rank_kind), []).append(plan)
    lines = []
    for kind, users in by_kind.items():
        ranks = calibration.ranks.get(kind, {})
        sizes = {name: min(shapes[name]) for name in ranks if name in shapes}
        if ranks and all(min(ranks[name]) >= NEARLY_FULL * size for name, size in sizes.items()):
            full = ", ".join(f"{name} {min(ranks[name]):.0f} of {n}" for name, n in sizes.items())
            other = "a smaller encode.energy" if kind.startswith("energy") else "encode.rank=energy"
            names = ", ".join(dict.fromkeys(plan.name for plan in users))
            lines.append(
                f"ranks by {kind} are full in every encoder ({full}), so stage 1 of {names} shares "
                "tokens by how many each encoder has, not by what is in them; set "
                f"{other}, or encode.assignment=tokens if that is meant."
            )
    return tuple(lines)
