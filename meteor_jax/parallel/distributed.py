"""Many processes, one run: how they start, which rows each prepares, and how they end together.

What jax prints where a process is lost: the others end within `HEARTBEAT_SECONDS` with exit code
134 and "Terminating process because the JAX distributed service detected fatal errors … The
following tasks are unhealthy (stopped sending heartbeats)", with the lost process's number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import traceback
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meteor_jax.config import ConfigError, one_line
from meteor_jax.parallel.mesh import BATCH_AXES

HEARTBEAT_SECONDS = 100  # a process that was not heard of for so long counts as lost
START_SECONDS = 300
WAIT_SECONDS = 12 * 60 * 60  # while process 0 may build data sets
EXIT_PEER_LOST = 3  # exit code of a process that cannot go on without the others
_BARRIERS = itertools.count()  # all processes pass the same barriers in the same order


def start_processes(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    enable_preemption: bool = False,
) -> None:
    """Joins this process to the others of its run, before anything else that touches a device.

    Without arguments jax looks for a cluster that it knows (TPU pods, GKE, SLURM, Open MPI); where
    there is none, this is the only process and nothing happens.

    Args:
        coordinator: "host:port" of process 0; the port must be free there.
        heartbeat_seconds: after so long without a sign of life from one process, all end.
        enable_preemption: keep SIGTERM for `training.preemption`, which lets all processes stop
            at the same step, instead of ending at once.

    Raises:
        ConfigError: one line, if the arguments do not fit together or the others are not found.
    """
    if num_processes == 1:
        return
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ConfigError(
            f"many processes: {', '.join(missing)} missing; --coordinator, --num_processes and "
            "--process_id go together."
        )
    whole = process_id is not None and num_processes is not None
    if whole and not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id={process_id}: expected 0 to {num_processes - 1}.")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ConfigError(f"--coordinator={coordinator}: expected host:port.")
    jax.config.update("jax_enable_preemption_service", enable_preemption)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except ValueError as error:
        if missing and "coordinator_address" in str(error):
            return  # no cluster that jax knows
        raise ConfigError(f"many processes: {one_line(error)}") from error
    except RuntimeError as error:
        raise ConfigError(f"many processes: {one_line(error)}") from error


def is_main_process() -> bool:
    """True for the one process that writes what is written once: metrics, tables, small files."""
    return jax.process_index() == 0


def wait_for_processes(name: str) -> None:
    """Returns once every process has come here; `name` says where that is."""
    # Not over the devices: their collectives may give up sooner than process 0 is ready.
    ocp.multihost.get_barrier_sync_fn()(
        key=f"{name} {next(_BARRIERS)}", timeout_ms=WAIT_SECONDS * 1000
    )


def allgather_to_host(tree: Any) -> Any:
    """`jax.device_get` of arrays that several processes may hold; all of them call this."""

    def whole(array: Any) -> Any:
        if isinstance(array, jax.Array) and not (
            array.is_fully_addressable or array.is_fully_replicated
        ):
            return multihost_utils.process_allgather(array, tiled=True)
        return array

    return jax.device_get(jax.tree.map(whole, tree))


def sum_over_processes(array: np.ndarray) -> np.ndarray:
    """The sum, in float32, of what each process has; all of them call this."""
    if jax.process_count() == 1:
        return array
    return multihost_utils.process_allgather(array.astype(np.float32)).sum(0)


@contextlib.contextmanager
def main_process_first(name: str) -> Generator[None]:
    """Lets process 0 do something before the others, who then find its files."""
    if not is_main_process():
        wait_for_processes(name)
    try:
        yield
    finally:
        if is_main_process():
            wait_for_processes(name)


@contextlib.contextmanager
def abort_all_on_error(*, alike: tuple[type[Exception], ...] = (ConfigError,)) -> Generator[None]:
    """Ends this process, where there are many, at an error that only it may have met.

    It says so in one line and leaves at once: waiting for the others before leaving, it would wait
    for those who wait for it. Errors that all processes meet `alike` pass through.
    """
    try:
        yield
    except alike:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exc()
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends: "
            f"{one_line(error)[:300]}; see whether another one was lost, and start all of them "
            "again: the run goes on from its last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(EXIT_PEER_LOST)


@dataclasses.dataclass(frozen=True)
class DataShard:
    """Which part of every batch a process prepares: part `index` of `count` equal ones."""

    index: int = 0
    count: int = 1


def row_shard(mesh: Mesh) -> DataShard:
    """The rows that this process's devices hold; processes that share rows prepare the same.

    Raises:
        ConfigError: if the mesh deals rows out so that processes share some but not all.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    rows: dict[int, set[int]] = {}
    for device, (part,) in sharding.devices_indices_map((mesh.devices.size,)).items():
        rows.setdefault(device.process_index, set()).update(range(*part.indices(mesh.devices.size)))
    groups = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, groups)) != mesh.devices.size or len(set(map(len, groups))) > 1:
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: processes share some rows of a batch but not all; let data "
            "× fsdp be a multiple of the number of processes, or divide it."
        )
    return DataShard(
        index=groups.index(tuple(sorted(rows[jax.process_index()]))), count=len(groups)
    )
