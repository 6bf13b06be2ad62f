"""From the folder of a run, or of converted weights, to an experiment and its parameters."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from meteor_jax.checkpoint import (
    CONFIG_FILE,
    FOLDER,
    CheckpointError,
    find_step,
    restore_params,
    restore_parts,
)
from meteor_jax.experiment.config import Experiment, load_experiment
from meteor_jax.inference.layout import param_dtype, param_shapes
from meteor_jax.models.family import build_model
from meteor_jax.training.checkpoint_compat import check_model


def read_experiment(folder: str | Path, *, config: str | None = None) -> Experiment:
    """The experiment of a run.

    Args:
        config: a config file, as `configs/eagle.py:x4_7b`; the run's own config.json where None.

    Raises:
        CheckpointError: if there is neither.
    """
    if config is not None:
        return load_experiment(_load_config(config))
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"no {path}: give the config, or a folder that has been trained.")
    return load_experiment(json.loads(path.read_text(encoding="utf-8")))


def load_params(
    experiment: Experiment,
    folder: Path,
    *,
    mesh: Mesh,
    step: int | None = None,
    init_from: tuple[str, ...] = (),
) -> tuple[Any, int | None]:
    """The parameters on `mesh`, as inference holds them, and the step of their checkpoint.

    They are cast on the host as they are read, shard by shard; no device ever holds float32 where
    `eval.param_dtype` is less.

    Args:
        step: of the checkpoint; None takes the newest.
        init_from: folders whose parts make up the model together, instead of `folder`.

    Raises:
        CheckpointError: no such checkpoint, or one that does not fit the experiment.
    """
    like = param_shapes(experiment, mesh=mesh, dtype=param_dtype(experiment))
    model = build_model(experiment.model)
    check, unpadded = functools.partial(check_model, model=model), model.unpadded_shapes
    if not init_from:
        step = find_step(folder, step=step)
        return restore_params(folder, like, step=step, check=check, unpadded=unpadded), step
    if step is not None:
        raise CheckpointError(f"step {step}: init_from takes the newest; name one --checkpoint.")
    params = restore_parts(init_from, like, check=check, unpadded=unpadded)
    if missing := sorted(like.keys() - params.keys()):
        raise CheckpointError(f"init_from: nothing there holds {', '.join(missing)}.")
    return params, None


def source_folder(experiment: Experiment, workdir: Path) -> tuple[Path, tuple[str, ...]]:
    """Where a run's tokenizer and calibration are, and `init_from` if its parameters are there."""
    if (workdir / FOLDER).is_dir() or not experiment.init_from:
        return workdir, ()
    return Path(experiment.init_from[0]), experiment.init_from


def _load_config(text: str) -> Any:
    path, _, argument = text.partition(":")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    if spec is None or not Path(path).is_file():
        raise CheckpointError(f"config file {path} does not exist.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*[argument] if argument else [])
