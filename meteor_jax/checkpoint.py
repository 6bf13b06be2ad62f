"""Checkpoints with Orbax: written atomically and in the background, restored to any sharding.

A checkpoint holds, as separate items, so that evaluation reads no more than it needs:
`params`, `ema` (where there is one), `progress` (optimizer, step, random key) and `config` (the
whole config as JSON). One that was converted from PyTorch (`meteor_jax.convert`) has no progress,
but `source` (where it comes from, as JSON) and `unused` (tensors that the model has no parameter
for).

Nothing in it depends on the mesh or on the number of processes; where the data stands follows
from the step. With many processes all of them save and restore, into one folder that all see.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from flax import serialization

from meteor_jax.config import ConfigError

# Files and folders of a workdir.
FOLDER = "checkpoints"
CONFIG_FILE = "config.json"
CALIBRATION_FILE = "calibration.json"
TOKENIZER_FOLDER = "tokenizer"


class CheckpointError(ConfigError):
    """There is no checkpoint, or it does not fit. The message is one line."""


class CheckPart(Protocol):
    """Raises CheckpointError where parts of a model are not what their shapes seem to be."""

    def __call__(
        self, config: Mapping[str, Any], /, *, source: str | Path, parts: Collection[str] | None
    ) -> None: ...


def open_checkpoints(
    workdir: Path, *, keep: int | None = None, read_only: bool = False
) -> ocp.CheckpointManager:
    """The checkpoints of a workdir; `keep` limits how many are kept. Close it, or use `with`.

    Raises:
        CheckpointError: if `read_only` and the workdir has none.
    """
    folder = Path(workdir).absolute() / FOLDER
    if read_only and not Path(workdir).is_dir():
        raise CheckpointError(f"no workdir {workdir}: train first, or correct --workdir.")
    if read_only and not folder.is_dir():
        raise CheckpointError(f"no checkpoint in {workdir}: train first, or correct --workdir.")
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only
        ),
        item_handlers={
            "params": ocp.StandardCheckpointHandler(),
            "ema": ocp.StandardCheckpointHandler(),
            "progress": ocp.StandardCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
            "source": ocp.JsonCheckpointHandler(),
            "unused": ocp.StandardCheckpointHandler(),
        },
    )


def save(
    checkpoints: ocp.CheckpointManager,
    state: Any,
    *,
    step: int,
    config: Mapping[str, Any],
) -> None:
    """Begins to write a `TrainState`; returns once it is copied off the devices.

    A checkpoint that already exists for `step` is left as it is.
    """
    if step in checkpoints.all_steps():
        return
    items = {
        "params": ocp.args.StandardSave(state.params),
        "progress": ocp.args.StandardSave(_progress(state)),
        "config": ocp.args.JsonSave(dict(config)),
    }
    if state.ema is not None:
        items["ema"] = ocp.args.StandardSave(state.ema)
    checkpoints.save(step, args=ocp.args.Composite(**items))


def restore(checkpoints: ocp.CheckpointManager, like: Any) -> Any:
    """The newest `TrainState`, laid out as `like`, whatever mesh it was saved from.

    Args:
        like: a TrainState of ShapeDtypeStructs with shardings.

    Raises:
        CheckpointError: naming the first parameters that differ, both shapes and what to do.
    """
    step = _newest(checkpoints)
    wanted = {"params": like.params, "progress": _progress(like)}
    if like.ema is not None:
        wanted["ema"] = like.ema
    _check_fit(checkpoints, step, wanted)
    args = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
    restored = checkpoints.restore(step, args=ocp.args.Composite(**args))
    progress = restored["progress"]
    return like.replace(
        step=progress["step"],
        params=restored["params"],
        opt_state=serialization.from_state_dict(like.opt_state, progress["opt_state"]),
        rng=progress["rng"],
        ema=restored["ema"] if like.ema is not None else None,
    )


def find_step(workdir: Path, *, step: int | None = None) -> int:
    """The step of the newest checkpoint in a workdir, or `step` if it has a checkpoint.

    Raises:
        CheckpointError: no workdir, no checkpoint, or none of that step.
    """
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        return _choose(checkpoints, step)


def read_config(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The config that the checkpoint of `step` was written with; {} where it has none."""
    if not (_path(checkpoints, step) / "config").exists():
        return {}
    args = ocp.args.Composite(config=ocp.args.JsonRestore())
    return checkpoints.restore(step, args=args)["config"]


def restore_params(
    workdir: Path,
    like: Any,
    *,
    step: int | None = None,
    check: CheckPart | None = None,
    unpadded: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Any:
    """The parameters in a workdir, laid out as `like`: their moving average if it was kept.

    Args:
        like: nested dict of ShapeDtypeStructs or arrays, `jax.eval_shape` of the model's init.
        step: of the checkpoint; None takes the newest.
        check: called with the checkpoint's config, the workdir and None; may refuse.
        unpadded: by path, shapes that arrays may have in the checkpoint instead; zeros are added,
            for which `like` needs shardings.

    Raises:
        CheckpointError: no workdir, no such checkpoint, or one of another model.
    """
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        step = _choose(checkpoints, step)
        name = _params_item(checkpoints, step)
        is_exact = _check_fit(checkpoints, step, {name: like}, unpadded=unpadded)
        if check is not None:
            check(read_config(checkpoints, step), source=workdir, parts=None)
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(like, strict=is_exact)})
        return checkpoints.restore(step, args=args)[name]


def restore_parts(
    workdirs: Sequence[str | Path],
    like: Mapping[str, Any],
    *,
    check: CheckPart | None = None,
    unpadded: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> dict[str, Any]:
    """The parts of `like` ("llama", "clip", …) that the newest checkpoints of some workdirs hold.

    Every array goes straight into its shards.

    Args:
        like: a model's parameters as ShapeDtypeStructs with shardings.
        check: called with each workdir's config, the workdir and the parts it holds; may refuse.
        unpadded: as in `restore_params`.

    Raises:
        CheckpointError: no checkpoint, a part that the model lacks, one that two workdirs have, or
            one of other shapes, with its paths.
    """
    parts: dict[str, Any] = {}
    for workdir in workdirs:
        with open_checkpoints(Path(workdir), read_only=True) as checkpoints:
            step = _newest(checkpoints)
            name = _params_item(checkpoints, step)
            held = checkpoints.item_metadata(step)[name].tree.keys()
            if strange := sorted(held - like.keys()):
                raise CheckpointError(
                    f"init_from: {workdir} holds {', '.join(strange)}, but the model has "
                    f"{', '.join(like)}; set model.encoders and model.fusion to match it."
                )
            if twice := sorted(held & parts.keys()):
                raise CheckpointError(
                    f"init_from: {workdir} holds {', '.join(twice)}, which came before; name one "
                    "source for each part."
                )
            wanted = {part: like[part] for part in held}
            is_exact = _check_fit(checkpoints, step, {name: wanted}, unpadded=unpadded)
            if check is not None:
                check(read_config(checkpoints, step), source=workdir, parts=held)
            args = ocp.args.Composite(**{name: ocp.args.StandardRestore(wanted, strict=is_exact)})
            parts |= checkpoints.restore(step, args=args)[name]
    return parts


def parts_in(workdir: str | Path) -> set[str]:
    """The parts of a model ("llama", "clip", …) that the newest checkpoint of a workdir holds.

    Raises:
        CheckpointError: no workdir, or no checkpoint.
    """
    with open_checkpoints(Path(workdir), read_only=True) as checkpoints:
        step = _newest(checkpoints)
        return set(checkpoints.item_metadata(step)[_params_item(checkpoints, step)].tree)


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json beside the checkpoints, whole or not at all."""
    if jax.process_index() == 0:
        path = Path(workdir) / CONFIG_FILE
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(path)


def _progress(state: Any) -> dict[str, Any]:
    opt_state = serialization.to_state_dict(state.opt_state)
    return {"step": state.step, "rng": state.rng, "opt_state": opt_state}


def _newest(checkpoints: ocp.CheckpointManager) -> int:
    step = checkpoints.latest_step()
    if step is None:
        raise CheckpointError(
            f"no checkpoint in {checkpoints.directory.parent}: train first, or correct --workdir."
        )
    return step


def _choose(checkpoints: ocp.CheckpointManager, step: int | None) -> int:
    newest, steps = _newest(checkpoints), checkpoints.all_steps()
    if step is not None and step not in steps:
        raise CheckpointError(
            f"no checkpoint of step {step} in {checkpoints.directory.parent}; there are "
            f"{', '.join(map(str, sorted(steps)))}."
        )
    return newest if step is None else step


def _params_item(checkpoints: ocp.CheckpointManager, step: int) -> str:
    return "ema" if (_path(checkpoints, step) / "ema").exists() else "params"


def _path(checkpoints: ocp.CheckpointManager, step: int) -> Path:
    return Path(checkpoints.directory) / str(step)


def _check_fit(
    checkpoints: ocp.CheckpointManager,
    step: int,
    wanted: Mapping[str, Any],
    *,
    unpadded: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> bool:
    """Raises CheckpointError unless the checkpoint has `wanted`'s paths and shapes, or those of
    `unpadded`; whether there are none of these."""
    saved = checkpoints.item_metadata(step)
    is_exact, differences = True, []
    for item, tree in wanted.items():
        if item not in saved or saved[item] is None:
            differences.append(f"{item} is not in it")
            continue
        have, want = _shapes(saved[item].tree), _shapes(tree)
        shorter = {
            path
            for path in want.keys() & unpadded.keys()
            if have.get(path) == unpadded[path] != want[path]
        }
        is_exact &= not shorter
        differences += [
            f"{item}/{path}: checkpoint {have.get(path, 'has none')}, config "
            f"{want.get(path, 'has none')}"
            for path in sorted((have.keys() | want.keys()) - shorter)
            if have.get(path) != want.get(path)
        ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise CheckpointError(
            f"checkpoint {_path(checkpoints, step)} is of another config: "
            f"{'; '.join(differences[:3])}{more}. Use the config it was written with "
            f"({CONFIG_FILE} in its workdir), or another --workdir."
        )
    return is_exact


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }
