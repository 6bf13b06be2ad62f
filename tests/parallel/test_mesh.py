"""The mesh and the path rules."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from meteor_jax.config import ConfigError
from meteor_jax.parallel.mesh import (
    AXES,
    MeshConfig,
    check_batch_size,
    make_mesh,
    parse_mesh,
    regroup,
)
from meteor_jax.parallel.rules import parameter_spec, shard_batch
from tests.fake_devices import fake_slices


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2), devices=jax.devices()[:8])


def test_minus_one_takes_the_rest(mesh):
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("config", [MeshConfig(3), MeshConfig(-1, 3), MeshConfig(2, 2, 1)])
def test_mesh_that_does_not_fit(config):
    with pytest.raises(ConfigError, match="does not fit 8 devices: choose sizes"):
        make_mesh(config, devices=jax.devices()[:8])


@pytest.mark.parametrize("config", [MeshConfig(-1, -1), MeshConfig(0)])
def test_mesh_that_makes_no_sense(config):
    with pytest.raises(ConfigError, match="at most one of them is -1"):
        make_mesh(config)


def mesh_or_error(config, devices):
    try:
        return make_mesh(config, devices=devices)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:400]}"


@pytest.mark.parametrize("config", [MeshConfig(2, -1), MeshConfig(-1, 8, 4), MeshConfig(4, 2, 16)])
def test_slices_divide_the_data_axis(config):
    mesh = mesh_or_error(config, fake_slices(2))
    assert isinstance(mesh, Mesh), mesh
    half = mesh.shape["data"] // 2
    for index, part in enumerate((mesh.devices[:half], mesh.devices[half:])):
        assert {device.slice_index for device in part.flat} == {index}
    assert mesh.size == 128 and mesh.axis_names == AXES
    assert {axis.name for axis in mesh.axis_types} == {"Auto"}


@pytest.mark.parametrize("config", [MeshConfig(1, -1), MeshConfig(3, 2), MeshConfig(1, 1, -1)])
def test_slices_that_do_not_divide_the_data_axis_are_one_line(config):
    assert mesh_or_error(config, fake_slices(2)).endswith(
        "does not fit 2 slices of 64 devices: data must be a multiple of 2, and the product 128; "
        "try data=2, fsdp=64."
    )


def test_nodes_of_gpus_may_share_any_axis():
    nodes = fake_slices(4, side=2, platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    mesh = mesh_or_error(MeshConfig(1, -1), nodes)
    assert isinstance(mesh, Mesh), mesh
    assert [device.id for device in mesh.devices.flat] == list(range(16))


def test_an_axis_need_not_be_a_side_of_the_slice():
    mesh = mesh_or_error(MeshConfig(2, 2, 16), fake_slices(1, device_kind="TPU v5"))
    assert isinstance(mesh, Mesh), mesh


def test_regrouped_devices_keep_their_order(mesh):
    other = regroup(mesh, MeshConfig(data=-1, tensor=4))
    assert dict(other.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert list(other.devices.flat) == list(mesh.devices.flat)
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        regroup(mesh, MeshConfig(3))


def test_a_mesh_as_text():
    assert parse_mesh("fsdp=64") == MeshConfig(1, 64, 1)
    assert parse_mesh("data=-1, tensor=8") == MeshConfig(-1, 1, 8)
    for text, message in {
        "8": "eval.mesh: expected such as data=1,fsdp=64, got '8'",
        "tensr=8": "eval.mesh.tensr: no such field. Did you mean 'tensor'?",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_mesh(text, where="eval.mesh")


def test_rules(mesh):
    assert parameter_spec("llama/blocks/stack/query/kernel", (4, 16, 16), mesh) == P(
        None, "fsdp", "tensor"
    )
    assert parameter_spec("llama/blocks/stack/down/kernel", (4, 32, 16), mesh) == P(
        None, "tensor", "fsdp"
    )
    assert parameter_spec("llama/blocks/stack/up/kernel", (4, 16, 7), mesh) == P(None, "fsdp", None)
    assert parameter_spec("clip/blocks/stack/norm1/scale", (3, 16), mesh) == P(None, None)
    assert parameter_spec("step", (), mesh) == P()


def test_axis_that_does_not_divide_splits_the_other_dimension_if_that_is_free():
    spec = "stage0/stack/fc1/kernel", (3, 6, 8)
    for sizes, expected in {
        (1, 4, 1): P(None, None, "fsdp"),  # 4 does not divide 6, and tensor is free to go
        (1, 1, 3): P(None, "tensor", None),
        (1, 4, 2): P(None, None, "tensor"),
        (1, 3, 3): P(None, "fsdp", None),
        (1, 5, 1): P(None, None, "tensor"),
    }.items():
        assert parameter_spec(*spec, AbstractMesh(sizes, AXES)) == expected, sizes


def test_matrix_without_a_rule_is_an_error(mesh):
    with pytest.raises(ValueError, match=r"no sharding rule .* adapter/weights \(4, 4\)"):
        parameter_spec("adapter/weights", (4, 4), mesh)


def test_batch_is_split_by_rows(mesh):
    rows = np.arange(8.0).reshape(8, 1)
    placed = shard_batch({"rows": rows}, mesh)["rows"]
    assert placed.addressable_shards[0].data.shape == (2, 1)
    np.testing.assert_array_equal(placed, rows)
    with pytest.raises(ConfigError, match=r"batch_size: 6 rows do not divide into .* = 4 parts"):
        check_batch_size(6, mesh, where="batch_size")
