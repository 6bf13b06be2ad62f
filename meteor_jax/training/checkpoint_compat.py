"""Whether a checkpoint and a config belong together, beyond the shapes of the parameters.

Another number of heads, or another order of the data, fits all shapes and yet makes no sense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from meteor_jax.checkpoint import CONFIG_FILE, CheckpointError
from meteor_jax.config import ConfigError, build
from meteor_jax.experiment.config import Experiment, load_experiment
from meteor_jax.models.family import Family, ModelConfig, build_model

# How a model is computed or began, not what it is.
IGNORED_FIELDS_MODEL = (
    "remat",
    "init_std",
    "layer_scale_init",
    "max_positions",
    "pad_vocab_to_multiple_of",
)
# In another model an encoder may go on at another resolution, a decoder with longer texts.
IGNORED_FIELDS_PARTS = (
    *IGNORED_FIELDS_MODEL,
    "image_size",
    "grid_side",
    "position_side",
    "rope_theta",
)
IGNORED_FIELDS_DATA = ("num_workers", "prefetch", "record_cache_size", "data_dir")
DATA_OF_STAGE = ("task", "template", "text_length", "batch_size")


def check_model(
    document: Mapping[str, Any],
    *,
    model: Family,
    source: str | Path,
    parts: Collection[str] | None = None,
) -> None:
    """Refuses a model whose parameters mean something else than those of a checkpoint.

    Args:
        document: the checkpoint's config; one that says nothing of the model is not judged.
        source: where the checkpoint is, for the message.
        parts: of the model that are taken from it ("llama", "clip", …); None takes it whole.

    Raises:
        CheckpointError: naming the first fields that differ, both values and what to do.
    """
    try:
        saved = build_model(build(ModelConfig, document["model"]))
    except (KeyError, ConfigError):
        return
    names = model.parts if parts is None else parts
    free = IGNORED_FIELDS_PARTS if parts is not None else IGNORED_FIELDS_MODEL
    found = [
        difference
        for name in names
        if name in model.parts and name in saved.parts
        for difference in _differences(
            saved.parts[name], model.parts[name], where=f"model.{name}", free=free
        )
    ]
    shared = ("family",) if type(saved) is not type(model) else model.shared_fields(parts)
    found += [
        f"model.{name}: checkpoint {getattr(saved.config, name)}, config "
        f"{getattr(model.config, name)}"
        for name in shared
        if getattr(saved.config, name) != getattr(model.config, name)
    ]
    if found:
        raise _another_config(
            source,
            found,
            advice=f"Use the fields it was written with, as {CONFIG_FILE} there has them.",
        )


def resumed_stage(
    document: Mapping[str, Any], experiment: Experiment, *, step: int, workdir: str | Path
) -> str | None:
    """The stage that the checkpoint of `step` was in, where its config says so.

    A run whose only stage was the first stands at its end, not at the beginning of the second.
    Steps may be added to a run; what they would go on with must be the same.

    Raises:
        CheckpointError: if the model, the data or the stages so far are others.
    """
    check_model(document, model=build_model(experiment.model), source=workdir)
    try:
        saved = load_experiment(document)
    except ConfigError:
        return None
    found = _differences(saved.data, experiment.data, where="data", free=IGNORED_FIELDS_DATA)
    if saved.seed != experiment.seed:
        found.append(f"seed: checkpoint {saved.seed}, config {experiment.seed}")
    stage = saved.train.stage_at(step)
    now = {other.name: other for other in experiment.train.stages()}
    for before in saved.train.stages():
        if before.start > stage.start:
            continue
        where, after = f"train.{before.name}", now.get(before.name)
        if after is None or after.start != before.start:
            start = "none" if after is None else f"from step {after.start}"
            found.append(f"{where}: checkpoint from step {before.start}, config {start}")
            continue
        found += _differences(before.config, after.config, where=where, only=DATA_OF_STAGE)
        if after.stop < min(step, before.stop):
            found.append(
                f"{where}.steps: checkpoint {before.config.steps}, config {after.config.steps}"
            )
    if found:
        raise _another_config(
            workdir,
            found,
            advice="Go on with the config it was written with "
            f"({CONFIG_FILE} there), or begin in another --workdir with init_from.",
        )
    return stage.name


def _differences(
    saved: Any, now: Any, *, where: str, free: Collection[str] = (), only: Collection[str] = ()
) -> list[str]:
    if type(saved) is not type(now):
        return [f"{where}: checkpoint {type(saved).__name__}, config {type(now).__name__}"]
    return [
        f"{where}.{field.name}: checkpoint {getattr(saved, field.name)!r}, config "
        f"{getattr(now, field.name)!r}"
        for field in dataclasses.fields(now)
        if field.name not in free
        and (not only or field.name in only)
        and _unmoved(getattr(saved, field.name)) != _unmoved(getattr(now, field.name))
    ]


def _unmoved(value: Any) -> Any:
    """Paths by their last part, because folders may have been moved."""
    if isinstance(value, tuple):
        return tuple(map(_unmoved, value))
    return Path(value).name if isinstance(value, str) and "/" in value else value


def _another_config(source: str | Path, found: list[str], *, advice: str) -> CheckpointError:
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return CheckpointError(
        f"the checkpoint in {source} is of another config: {'; '.join(found[:3])}{more}. {advice}"
    )
