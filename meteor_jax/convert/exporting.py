"""Back to PyTorch: a workdir becomes a folder of safetensors under EAGLE's names."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table as Grid
from safetensors.numpy import save_file

from meteor_jax.checkpoint import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    CheckpointError,
    open_checkpoints,
)
from meteor_jax.config import ConfigError, build
from meteor_jax.convert.loading import AS_IS, copy_tokenizer
from meteor_jax.convert.writing import whole_or_nothing
from meteor_jax.models.conversion import Conversion, ConversionError, Rule
from meteor_jax.models.family import ModelConfig, get_family
from meteor_jax.progress import progress_bar

GIGABYTE = 10**9
INDEX_FILE = "model.safetensors.index.json"
READ_BYTES = GIGABYTE  # of parameters at once, unless a single one is larger


def export_checkpoint(
    workdir: Path,
    output: Path,
    *,
    dtype: str = AS_IS,
    shard_bytes: int = 2 * GIGABYTE,
    console: Console | None = None,
) -> None:
    """Writes the newest checkpoint of `workdir` as an EAGLE folder.

    A converted checkpoint that has not been trained gives back what it was made of, bit for bit:
    it remembers each tensor's dtype, and keeps the tensors that the model does not use. Of one that
    was trained, those tensors are missing, which EAGLE's code never reads.

    Args:
        dtype: of the tensors, out of `loading.DTYPES`; "as-is" is what each had before it was
            converted, or has in the checkpoint.
        shard_bytes: the most that one file holds, unless a single tensor is larger.

    Raises:
        ConversionError: all parameters that are not what the config says.
        ConfigError, OSError: in one line, what else is wrong. Then nothing is left behind.
    """
    with whole_or_nothing(output) as folder:
        checkpoint = _open(Path(workdir))
        checkpoint.check()
        shards = _Shards(folder, shard_bytes)
        names = checkpoint.tensor_names()
        with progress_bar(enabled=console is not None) as bar:
            tensors = checkpoint.tensors(names)
            for name, tensor in bar.track(tensors, total=len(names), description="Writing tensors"):
                stored = checkpoint.dtypes.get(name, tensor.dtype.name)
                tensor = tensor.astype(jnp.dtype(stored if dtype == AS_IS else dtype))
                shards.add(name, tensor)
        shards.finish()
        (folder / CONFIG_FILE).write_text(json.dumps(checkpoint.torch_config(), indent=2) + "\n")
        copy_tokenizer(Path(workdir) / TOKENIZER_FOLDER, folder)
    if console is not None:
        checkpoint.report(names, console)


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """What a checkpoint holds, unread.

    Attributes:
        folder: of the parameters (or their moving average).
        shapes: nested dict of ShapeDtypeStructs.
        unused: the same, by tensor name, for tensors without a parameter.
        source: what the conversion noted; empty for one that was trained.
    """

    config: ModelConfig
    folder: Path
    shapes: dict[str, Any]
    unused: dict[str, Any]
    source: dict[str, Any]

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Each tensor's dtype before it was converted."""
        return self.source.get("dtypes", {})

    @property
    def rules(self) -> list[Rule]:
        """One parameter after the other."""
        return list(self.conversion.table(self.config, tuple(self.shapes)).rules)

    @property
    def conversion(self) -> Conversion:
        return get_family(self.config.family).required_conversion()

    def tensor_names(self) -> list[str]:
        """All that the folder will hold; of an EAGLE checkpoint, what it held before."""
        names = dict.fromkeys(name for rule in self.rules for name, _ in rule.expand())
        names |= dict.fromkeys(self.unused)
        if self.source.get("part") == self.conversion.whole:
            return [name for name in names if name in self.dtypes]
        return list(names)

    def check(self) -> None:
        """Raises ConversionError unless the checkpoint is what its config says."""
        have = {
            path: leaf.shape
            for path, leaf in flax.traverse_util.flatten_dict(self.shapes, sep="/").items()
        }
        want = self.conversion.param_shapes(self.config, tuple(self.shapes))
        problems = [
            f"{path}: config {want.get(path, 'has none')}, checkpoint {have.get(path, 'has none')}"
            for path in sorted(have.keys() | want.keys())
            if have.get(path) != want.get(path)
        ]
        if self.source.get("part") == self.conversion.whole:
            lost = self.dtypes.keys() - set(self.tensor_names())
            problems += [f"{name}: it was kept aside and is not there" for name in sorted(lost)]
        if problems:
            raise ConversionError(problems)

    def report(self, names: list[str], console: Console) -> None:
        """Prints how many tensors came from where."""
        grid = Grid("part", "tensors", "from")
        written = set(names)
        counts = Counter(
            rule.target.split("/")[0]
            for rule in self.rules
            for name, _ in rule.expand()
            if name in written
        )
        for part, count in counts.items():
            grid.add_row(part, str(count), "the parameters")
        grid.add_row("", str(len(names) - counts.total()), "what was kept aside")
        grid.add_row("", "0", "missing")
        console.print(grid)

    def tensors(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Each tensor with its name; `READ_BYTES` of parameters are in memory at a time, or one."""
        wanted = set(names)
        rules = {tuple(rule.target.split("/")): rule for rule in self.rules}
        shapes = flax.traverse_util.flatten_dict(self.shapes)
        for path, param in _read(self.folder, {path: shapes[path] for path in rules}):
            rule = rules[path]
            for name, row in rule.expand():
                tensor = rule.transform.save(param if row is None else param[row])
                if rule.padding_rows:
                    tensor = tensor[: -rule.padding_rows]
                if rule.unused_rows:
                    tensor = self._with_dropped_rows(name, rule, tensor)
                if name in wanted:
                    yield name, tensor
                    wanted.remove(name)
        yield from self._unused(sorted(wanted))

    def _with_dropped_rows(self, name: str, rule: Rule, tensor: np.ndarray) -> np.ndarray:
        rows = np.zeros((rule.unused_rows, *tensor.shape[1:]), tensor.dtype)
        if name in self.unused:
            [(_, rows)] = self._unused([name])
        dtype = jnp.promote_types(rows.dtype, tensor.dtype)
        return np.concatenate([rows.astype(dtype), tensor.astype(dtype)])

    def _unused(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        shapes: dict[tuple[str, ...], Any] = {(name,): self.unused[name] for name in names}
        for path, tensor in _read(self.folder.parent / "unused", shapes):
            yield path[0], tensor

    def torch_config(self) -> dict[str, Any]:
        """config.json as it came with the whole model, or a new one."""
        return self.conversion.config_json(
            self.config, part=self.source.get("part", ""), source=self.source.get("config", {})
        )


def _open(workdir: Path) -> _Checkpoint:
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise CheckpointError(f"no checkpoint in {workdir}: correct --source.")
        metadata = checkpoints.item_metadata(step)
        item = "ema" if metadata.get("ema") is not None else "params"
        source, unused = {}, {}
        if (Path(checkpoints.directory) / str(step) / "source").exists():
            args = ocp.args.Composite(source=ocp.args.JsonRestore())
            source = checkpoints.restore(step, args=args)["source"]
        if metadata.get("unused") is not None:
            unused = _structs(metadata["unused"].tree)
        folder = Path(checkpoints.directory) / str(step) / item
        shapes = _structs(metadata[item].tree)
    values = json.loads((workdir / CONFIG_FILE).read_text())["model"]
    config = build(ModelConfig, values, where="model")
    found = _Checkpoint(config, folder, shapes, unused, source)
    slices = sorted({rule.target.split("/")[0] for rule in found.rules if rule.whole})
    if slices:
        raise ConfigError(
            f"{workdir} has {', '.join(slices)}: these are slices of one tensor, and what was "
            "trained of each cannot be put together again; convert one with a single projector."
        )
    return found


def _structs(tree: Any) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _read(
    folder: Path, shapes: Mapping[tuple[str, ...], jax.ShapeDtypeStruct]
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Arrays of an item by path. Several are read at a time, because each read parses the metadata
    of all."""
    groups: list[dict[tuple[str, ...], Any]] = []
    room = 0
    for path, shape in shapes.items():
        size = shape.size * shape.dtype.itemsize
        if not groups or size > room:
            groups.append({})
            room = READ_BYTES
        groups[-1][path] = shape
        room -= size
    for group in groups:
        like = flax.traverse_util.unflatten_dict(group)
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
        restore = ocp.args.PyTreeRestore(item=like, restore_args=args, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder, args=restore)
        yield from flax.traverse_util.flatten_dict(restored).items()


class _Shards:
    """Files of at most so many bytes, and their index."""

    def __init__(self, folder: Path, shard_bytes: int):
        self._folder, self._shard_bytes = folder, shard_bytes
        self._waiting: dict[str, np.ndarray] = {}
        self._waiting_bytes = self._total_bytes = 0
        self._files: list[list[str]] = []

    @property
    def count(self) -> int:
        return len(self._files)

    def add(self, name: str, tensor: np.ndarray) -> None:
        if self._waiting and self._waiting_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        # A copy, so that a row does not hold the whole stacked parameter in memory.
        self._waiting[name] = np.array(tensor, order="C")
        self._waiting_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._waiting, self._folder / f"{len(self._files)}", metadata={"format": "pt"})
        self._files.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def finish(self) -> None:
        """Gives the files their names, which tell how many there are."""
        self._flush()
        places = {}
        for index, names in enumerate(self._files):
            file = f"model-{index + 1:05d}-of-{self.count:05d}.safetensors"
            (self._folder / str(index)).rename(self._folder / file)
            (self._folder / file).chmod(0o644)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": places}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
