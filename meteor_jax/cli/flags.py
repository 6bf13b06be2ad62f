"""Flags that several commands share: one name, one meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from meteor_jax.config import ConfigError
from meteor_jax.experiment.config import Experiment, load_experiment
from meteor_jax.inference.load import read_experiment
from meteor_jax.parallel.distributed import HEARTBEAT_SECONDS, start_processes
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.text import split_plans


def define_config(*, required: bool = True) -> None:
    default = "" if required else " Default: the one that the checkpoint was trained with."
    config_flags.DEFINE_config_file(
        "config", None, f"The experiment, such as configs/tiny.py.{default}", lock_config=True
    )
    if required:
        flags.mark_flag_as_required("config")


def define_workdir(help: str = "Folder of a trained run.", *, required: bool = True) -> None:
    flags.DEFINE_string("workdir", None, help, required=required)


def define_plans(default: str | None, use: str = "") -> None:
    help = f"Plans, as in 'full,fastv(layer=2,keep=64)'. {use}"
    flags.DEFINE_string("plans", default, help)


def define_calibration() -> None:
    flags.DEFINE_string(
        "calibration", None, "A run's calibration.json: measured ranks, and λ of adaptive plans."
    )


def define_output(help: str, *, default: str | None = None, required: bool = False) -> None:
    flags.DEFINE_string("output", default, help, required=required)


def define_processes() -> None:
    """For runs of many processes that jax does not find by itself; see `start`."""
    flags.DEFINE_string(
        "coordinator", None, "host:port of process 0, for processes outside TPU pods and SLURM."
    )
    flags.DEFINE_integer(
        "num_processes", None, "Number of processes; 1 disables the search for others."
    )
    flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")
    flags.DEFINE_integer(
        "heartbeat_seconds",
        HEARTBEAT_SECONDS,
        "A process that is silent for so many seconds counts as lost, and the others exit.",
        lower_bound=1,
    )


def start(options: flags.FlagValues, *, enable_preemption: bool = False) -> None:
    """`start_processes` as the flags of `define_processes` say."""
    start_processes(
        coordinator=options.coordinator,
        num_processes=options.num_processes,
        process_id=options.process_id,
        heartbeat_seconds=options.heartbeat_seconds,
        enable_preemption=enable_preemption,
    )


def read_config(options: flags.FlagValues, *, folder: Path | None = None) -> Experiment:
    """That of --config; without it the one that the run in `folder` was trained with."""
    if options.config is None and folder is not None:
        return read_experiment(folder)
    return load_experiment(options.config)


def config_document(options: flags.FlagValues) -> dict[str, Any]:
    """What --config holds, as JSON, to be recorded in checkpoints."""
    return json.loads(options.config.to_json_best_effort())


def read_plans(options: flags.FlagValues) -> list[str]:
    """The texts of --plans; none where the flag is not given."""
    return split_plans(options.plans or "")


def read_calibration(options: flags.FlagValues) -> Calibration:
    """What --calibration holds; without the flag an empty calibration.

    Raises:
        ConfigError: if there is no such file.
    """
    if options.calibration is None:
        return Calibration()
    path = Path(options.calibration)
    if not path.is_file():
        raise ConfigError(
            f"--calibration: there is no file {path}; expected a calibration.json that training or "
            "`meteor calibrate` wrote."
        )
    return Calibration.load(path)
