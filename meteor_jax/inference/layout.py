"""Where inference holds a model: its mesh, and dtype and layout of the parameters, decided once.

Training splits float32 parameters over `fsdp` and gathers each layer as it is needed. A batch of
whole conversations pays for that; a decoded token would wait for all parameters. So evaluation,
calibration, the bench and the ahead-of-time compiler hold them in the dtype of the computation,
copied on every device or split within the layers (`tensor`), where no parameter ever moves.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import Experiment
from meteor_jax.inference.engine.data_shards import broadcast
from meteor_jax.models.family import Family, ShardingRules, build_model
from meteor_jax.parallel.chips import find_chip
from meteor_jax.parallel.mesh import AXES, MeshConfig, make_mesh, num_slices, regroup
from meteor_jax.parallel.rules import parameter_shardings, with_shardings

# Of a device's memory, what parameters may take; caches and activations have the rest.
COMFORTABLE = 0.5
# What the computation casts to its dtype itself, before it multiplies or looks up. Norms, places
# and rotary tables are computed with in float32 and take next to no memory, so they keep it.
CAST = re.compile(r"/(kernel|embedding)$")


def param_dtype(experiment: Experiment) -> str:
    """The dtype in which inference holds matrices: `eval.param_dtype`, or the computation's."""
    asked = experiment.eval.param_dtype
    return experiment.model.dtype if asked == "auto" else asked


def param_shapes(experiment: Experiment, *, mesh: Mesh, dtype: str = "float32") -> Any:
    """The parameters' shapes, and how they lie on `mesh`: what `restore_params` asks for.

    Args:
        dtype: of matrices; everything else is float32, as it is in training.
    """
    model = build_model(experiment.model)
    shapes = _shapes(model, dtype)
    return with_shardings(shapes, parameter_shardings(shapes, mesh, rules=model.sharding_rules))


def cast_matrices(params: Any, dtype: str) -> Any:
    """`params`, arrays or shapes, with matrices in `dtype`."""

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        if not CAST.search(jax.tree_util.keystr(path, simple=True, separator="/")):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def inference_mesh(experiment: Experiment, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `eval.mesh` over `devices` (default: all); `choose_mesh`'s where that is "auto".

    Raises:
        ConfigError: one line, for a mesh that does not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    try:
        return make_mesh(_mesh_config(experiment, devices, resident_bytes=0), devices=devices)
    except ConfigError as error:
        raise ConfigError(f"eval.{error}") from error


def during_training(params: Any, experiment: Experiment, *, mesh: Mesh) -> tuple[Any, Mesh]:
    """Parameters that are being trained on `mesh` as inference holds them, and its mesh.

    One program casts and moves them, to the same devices. They are the same arrays where nothing
    changes. "auto" leaves room for what training holds: parameters, two moments, and an average.

    Raises:
        ConfigError: one line, for a mesh that does not fit the devices.
    """
    trained_shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    held = (4 if experiment.train.ema_decay else 3) * _device_bytes(params, trained_shardings)
    config = _mesh_config(experiment, mesh.devices.flat, resident_bytes=held)
    try:
        target = regroup(mesh, config)
    except ConfigError as error:
        raise ConfigError(f"eval.{error}") from error
    dtype = param_dtype(experiment)
    rules = build_model(experiment.model).sharding_rules
    wanted = parameter_shardings(params, target, rules=rules)
    like = cast_matrices(jax.eval_shape(lambda: params), dtype)
    same = jax.tree.map(
        lambda leaf, shape, sharding: (
            leaf.dtype == shape.dtype and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        ),
        params,
        like,
        wanted,
    )
    if all(jax.tree.leaves(same)):
        return params, target

    def cast(params: Any) -> Any:
        # Where they lie, so that what moves between devices is in the smaller dtype.
        return jax.lax.with_sharding_constraint(cast_matrices(params, dtype), trained_shardings)

    return jax.jit(cast, out_shardings=wanted)(params), target


def choose_mesh(
    shapes: Any,
    *,
    num_devices: int,
    slices: int,
    tensor_divisor: int,
    memory_bytes: float | None,
    rules: ShardingRules = (),
) -> MeshConfig:
    """The mesh with the fewest parts of a layer whose parameters fit a device comfortably.

    Parts divide the devices of a slice, and the family's `tensor_divisor`.
    Where even the most parts need more, it is those.

    Args:
        shapes: parameters, as ShapeDtypeStructs in the dtype that they are held in.
        memory_bytes: a device's, for inference; None, where it is not known, copies them.
    """
    most = math.gcd(num_devices // slices, tensor_divisor)
    for tensor in (parts for parts in range(1, most + 1) if most % parts == 0):
        config = MeshConfig(data=num_devices // tensor, fsdp=1, tensor=tensor)
        mesh = AbstractMesh((config.data, 1, tensor), AXES)
        held = _device_bytes(shapes, parameter_shardings(shapes, mesh, rules=rules))
        if memory_bytes is None or held <= COMFORTABLE * memory_bytes:
            break
    return config


def _mesh_config(
    experiment: Experiment, devices: Iterable[jax.Device], *, resident_bytes: float
) -> MeshConfig:
    asked, devices = experiment.eval.mesh, list(devices)
    if isinstance(asked, MeshConfig):
        return asked
    memory, model = _memory_bytes(devices), build_model(experiment.model)
    return choose_mesh(
        _shapes(model, param_dtype(experiment)),
        num_devices=len(devices),
        slices=num_slices(devices),
        tensor_divisor=model.tensor_divisor,
        rules=model.sharding_rules,
        memory_bytes=None if memory is None else memory - resident_bytes,
    )


def _memory_bytes(devices: Sequence[jax.Device]) -> float | None:
    """Of one device: what is known of the chip, which is the same ahead of time; else what process
    0 is told, if it is."""
    chip = find_chip(devices[0].device_kind)
    if chip is not None:
        return chip.memory_bytes
    stats = jax.local_devices()[0].memory_stats()
    return broadcast((stats or {}).get("bytes_limit"))


def _device_bytes(tree: Any, shardings: Any) -> float:
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


@functools.cache
def _shapes(model: Family, dtype: str) -> Any:
    init = functools.partial(model.init_params, seed=0)
    return cast_matrices(jax.eval_shape(init, model.inputs_spec(1)), dtype)
