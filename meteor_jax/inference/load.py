"""From the folder of a run, or of converted weights, to its experiment, parameters and engine."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from meteor_jax.checkpoint import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    FOLDER,
    TOKENIZER_FOLDER,
    CheckpointError,
    find_step,
    restore_params,
    restore_parts,
)
from meteor_jax.config import ConfigError
from meteor_jax.data.templates import Template, get_template, stop_id
from meteor_jax.data.tokenizers import Tokenizer, load_tokenizer
from meteor_jax.experiment.config import Experiment, load_experiment
from meteor_jax.experiment.eval_config import prompt_template
from meteor_jax.experiment.plans import resolve_plans
from meteor_jax.inference.classify import ClassPredictor
from meteor_jax.inference.engine.batching import BatchSizes
from meteor_jax.inference.engine.data_shards import DataShards
from meteor_jax.inference.engine.engine import Engine
from meteor_jax.inference.engine.predictor import Predictor, check_fits
from meteor_jax.inference.engine.prompts import PromptLimits
from meteor_jax.inference.generate import TextPredictor
from meteor_jax.inference.layout import inference_mesh, param_dtype, param_shapes
from meteor_jax.models.family import build_model
from meteor_jax.pruning.calibration import Calibration
from meteor_jax.pruning.plan import PrunePlan
from meteor_jax.pruning.text import split_plans
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


def load_engine(
    folder: str | Path,
    *,
    plans: str = "full",
    config: str | None = None,
    step: int | None = None,
    template: str = "",
    batch_size: int | None = None,
) -> Engine:
    """An engine over all devices, from the folder of a run or of converted weights.

    Args:
        plans: names or texts, as `evaluate.py --plans` takes them.
        config: a config file, as `configs/eagle.py:x4_7b`; the run's own where None.
        step: of the checkpoint; None takes the newest.
        template: of the prompts; the config's where it is "".
        batch_size: prompts asked and images encoded together; those of `config.eval` where None.

    Raises:
        ConfigError, CheckpointError: one line, for a plan, a template or a checkpoint that is
            wrong.
    """
    folder = Path(folder)
    experiment = read_experiment(folder, config=config)
    if batch_size is not None:
        sizes = {"batch_size": batch_size, "encode_batch_size": batch_size}
        sizes["visual_cache_images"] = max(batch_size, experiment.eval.visual_cache_images)
        changed = dataclasses.replace(experiment.eval, **sizes)
        experiment = dataclasses.replace(experiment, eval=changed)
    resolved = resolve_plans(
        split_plans(plans),
        library=experiment.plans,
        calibration=Calibration.load(folder / CALIBRATION_FILE),
    )
    if not resolved:
        raise ConfigError(f"plans: '{plans}' names no plan for an engine; name one, as 'full'.")
    mesh = inference_mesh(experiment)
    with jax.set_mesh(mesh):
        params, _ = load_params(experiment, folder, mesh=mesh, step=step)
        return make_engine(
            experiment,
            params,
            plans=resolved,
            tokenizer=load_tokenizer(experiment.data.tokenizer, folder=folder / TOKENIZER_FOLDER),
            template=template,
        )


def make_engine(
    experiment: Experiment,
    params: Any,
    *,
    plans: Sequence[PrunePlan],
    tokenizer: Tokenizer,
    template: str = "",
) -> Engine:
    """An engine on the mesh in force, for parameters that are there already.

    Raises:
        ConfigError: for a plan that does not fit the model, or a template without the question;
            ValueError: for a plan that was not calibrated.
    """
    config, model = experiment.eval, build_model(experiment.model)
    name = template or config.template or experiment.train.finetune.template
    layout, shards = get_template(prompt_template(name)), DataShards.current()
    predictors, spans = {}, [0]
    for plan in plans:
        plan.check_measured()
        try:
            spans.append(check_fits(model, params, plan=plan))
        except ValueError as error:
            raise ConfigError(f"plan '{plan.name}': {error}") from error
        predictors[plan.name] = make_predictor(
            experiment, params, plan=plan, tokenizer=tokenizer, template=layout
        )
    return Engine(
        predictors=predictors,
        tokenizer=tokenizer,
        template=layout,
        limits=PromptLimits(
            lengths=config.prompt_lengths,
            positions=model.max_positions,
            image_positions=max(spans),
        ),
        sizes=BatchSizes.of(config, shards=shards.count),
        shards=shards,
    )


def make_predictor(
    experiment: Experiment,
    params: Any,
    *,
    plan: PrunePlan,
    tokenizer: Tokenizer,
    template: Template,
) -> Predictor:
    """What answers under `plan`, on the mesh in force; see `make_engine`, which checks the plan."""
    model = build_model(experiment.model)
    if model.output != "text":
        return ClassPredictor(model, params, plan=plan, classes=experiment.data.classes)
    return TextPredictor(
        model=model.module,
        params=params,
        plan=plan,
        tokenizer=tokenizer,
        eos_id=stop_id(template, tokenizer),
        shards=DataShards.current(),
    )


def source_folder(experiment: Experiment, workdir: Path) -> tuple[Path, tuple[str, ...]]:
    """Where a run's tokenizer and calibration are, and `init_from` if its parameters are there."""
    if (workdir / FOLDER).is_dir() or not experiment.init_from:
        return workdir, ()
    return Path(experiment.init_from[0]), experiment.init_from


def _load_config(text: str) -> Any:
    path, _, argument = text.partition(":")
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise CheckpointError(f"config file {path} does not exist.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*[argument] if argument else [])
