"""The mesh of devices.

Three axes: `data` (batches are split, parameters copied), `fsdp` (batches and parameters are
split) and `tensor` (parameters are split within a layer).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from meteor_jax.config import ConfigError, build

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be −1 and takes all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), laid along their physical links.

    Slices of TPUs, which only a slower network joins, divide the `data` axis. (GPUs of several
    nodes may be split along any axis, in the order of their numbers.)

    Raises:
        ConfigError: if the axes do not multiply to the number of devices, or slices do not divide
            `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, slices = _mesh_sizes(config, devices), _slices_to_respect(devices)
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inner = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return _mesh(grid)


def regroup(mesh: Mesh, config: MeshConfig) -> Mesh:
    """Another mesh of the same devices in the same order, so that one program can take arrays that
    are on `mesh` and give arrays that are on this one.

    Raises:
        ConfigError: if the axes do not multiply to the number of devices.
    """
    return _mesh(mesh.devices.reshape(_mesh_sizes(config, list(mesh.devices.flat))))


def _mesh(grid: np.ndarray) -> Mesh:
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices_to_respect(devices: Sequence[Any]) -> int:
    """Slices that must divide `data`: of GPUs each node counts as one, and none must."""
    return num_slices(devices) if devices[0].platform == "tpu" else 1


def _mesh_sizes(config: MeshConfig, devices: Sequence[Any]) -> list[int]:
    """The size of each axis, −1 resolved; see `make_mesh`."""
    num_devices, slices = len(devices), _slices_to_respect(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"mesh {asked}: sizes are at least 1, and at most one of them is -1.")
    rest = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % rest == 0:
        sizes[sizes.index(-1)] = num_devices // rest
    if slices > 1 and (math.prod(sizes) != num_devices or sizes[0] % slices):
        raise ConfigError(
            f"mesh {asked} does not fit {slices} slices of {num_devices // slices} devices: data "
            f"must be a multiple of {slices}, and the product {num_devices}; try data={slices}, "
            f"fsdp={num_devices // slices}."
        )
    if math.prod(sizes) != num_devices:
        raise ConfigError(
            f"mesh {asked} does not fit {num_devices} devices: choose sizes whose product is "
            f"{num_devices}, or set one axis to -1."
        )
    return sizes


def num_slices(devices: Iterable[Any]) -> int:
    """How many slices the devices are in; those of a lone slice have no number."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def parse_mesh(text: str, *, where: str = "mesh") -> MeshConfig:
    """Reads "data=1,fsdp=64" as a `MeshConfig`; axes that are not named are 1.

    Raises:
        ConfigError: for an unknown axis or a size that is not a number.
    """
    sizes: dict[str, Any] = {"data": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        try:
            sizes[axis.strip()] = int(size)
        except ValueError:
            raise ConfigError(f"{where}: expected such as data=1,fsdp=64, got '{text}'.") from None
    return build(MeshConfig, sizes, where=where)


def check_batch_size(batch_size: int, mesh: Mesh, *, where: str) -> None:
    """Raises ConfigError unless `batch_size` rows divide evenly among the mesh's batch axes."""
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % shards:
        raise ConfigError(
            f"{where}: {batch_size} rows do not divide into data × fsdp = {shards} parts; use a "
            f"multiple of {shards}."
        )
