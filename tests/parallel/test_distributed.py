"""What a wrong launch is told, and who prepares which rows."""

import types
from typing import NamedTuple

import numpy as np
import pytest

from meteor_jax.config import ConfigError
from meteor_jax.parallel import distributed
from meteor_jax.parallel.distributed import (
    DataShard,
    abort_all_on_error,
    row_shard,
    start_processes,
)
from meteor_jax.parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 2}, "--coordinator, --process_id missing"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "expected 0 to 1"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "expected host:port"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        start_processes(**arguments)
    assert "\n" not in str(error.value)


def test_nothing_starts_for_one_process(monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", pytest.fail)
    start_processes(num_processes=1)


def test_no_cluster_is_one_process(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    start_processes()


def test_one_process_has_all_rows():
    assert row_shard(make_mesh(MeshConfig(2, 2, 2))) == DataShard(0, 1)


@pytest.mark.parametrize(
    ("process_of_row", "shards"),
    [
        ([0, 0, 1, 1], [DataShard(0, 2), DataShard(1, 2)]),
        ([1, 0, 1, 0], [DataShard(1, 2), DataShard(0, 2)]),
        ([[0, 1], [0, 1], [2, 3], [2, 3]], [DataShard(0, 2)] * 2 + [DataShard(1, 2)] * 2),
        ([[0, 1]] * 4, [DataShard(0, 1)] * 2),
    ],
)
def test_processes_that_hold_the_same_rows_prepare_the_same(monkeypatch, process_of_row, shards):
    layout = np.asarray(process_of_row).reshape(4, -1)
    fake_mesh(monkeypatch, layout)
    mesh = types.SimpleNamespace(devices=layout, shape={"data": 4, "tensor": layout.shape[1]})
    for index, shard in enumerate(shards):
        monkeypatch.setattr(distributed.jax, "process_index", lambda index=index: index)
        assert row_shard(mesh) == shard


def test_rows_that_are_shared_in_part_are_refused(monkeypatch):
    layout = np.asarray([[0, 0], [0, 1], [1, 1]])
    fake_mesh(monkeypatch, layout)
    with pytest.raises(ConfigError, match="share some rows of a batch but not all"):
        row_shard(types.SimpleNamespace(devices=layout, shape={"data": 3, "tensor": 2}))


class Device(NamedTuple):
    process_index: int
    id: int


def fake_mesh(monkeypatch, layout):
    """Shardings over devices that lie with other processes: layout[row] are their processes."""

    class Sharding:
        def __init__(self, *_):
            pass

        def devices_indices_map(self, shape):
            rows = shape[0] // len(layout)
            return {
                Device(process, place): (slice(row * rows, (row + 1) * rows),)
                for row, processes in enumerate(layout.tolist())
                for place, process in enumerate(processes, row * layout.shape[1])
            }

    monkeypatch.setattr(distributed, "NamedSharding", Sharding)


def test_an_error_of_one_process_alone_is_raised():
    with pytest.raises(RuntimeError, match="anything"), abort_all_on_error():
        raise RuntimeError("anything")


def test_an_error_among_many_ends_the_process_with_one_line(monkeypatch, capsys):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.os, "_exit", end)
    with pytest.raises(Ended, match="3"), abort_all_on_error():
        raise distributed.jax.errors.JaxRuntimeError("Gloo failed:\nconnection closed")
    message = capsys.readouterr().err
    assert message.startswith("error: process 0 of 2 ends: Gloo failed: connection closed; see")
    assert message.count("\n") == 1
    with pytest.raises(ConfigError), abort_all_on_error():
        raise ConfigError("the same everywhere")
