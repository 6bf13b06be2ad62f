"""From PyTorch: any known checkpoint becomes a workdir that `checkpoint.restore_params` reads."""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from meteor_jax.checkpoint import TOKENIZER_FOLDER, write_config
from meteor_jax.config import ConfigError, build
from meteor_jax.convert.formats import recognise, rename
from meteor_jax.convert.matching import Match, match, report
from meteor_jax.convert.sources import Entry, Source, open_source
from meteor_jax.convert.writing import Piece, StreamedArray, whole_or_nothing, write_checkpoint
from meteor_jax.models.conversion import ConversionError, Fields, Rule
from meteor_jax.models.family import ModelConfig
from meteor_jax.progress import progress_bar

AS_IS = "as-is"
DTYPES = (AS_IS, "float32", "bfloat16", "float16")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def convert_checkpoint(
    source_path: Path,
    output: Path,
    *,
    format_name: str | None = None,
    dtype: str = AS_IS,
    overrides: Sequence[str] = (),
    split_projector: bool = False,
    name: str | None = None,
    console: Console | None = None,
) -> ModelConfig:
    """Writes the workdir `output` from the checkpoint at `source_path`, and returns its config.

    Args:
        source_path: a folder or a file; see `formats.all_formats`.
        format_name: a key of `all_formats()`; None recognises it.
        dtype: of the parameters, out of `DTYPES`; "as-is" leaves each as it is.
        overrides: fields of the config, such as "llama.num_heads=2".
        split_projector: gives each encoder its own projector, from slices of EAGLE's single one.
        name: of an encoder that comes alone, in the model; its type where None.
        console: where the report goes; None prints nothing.

    Raises:
        ConversionError: everything that does not fit, at once. Then nothing is left behind.
        ConfigError, OSError: in one line, what else is wrong.
    """
    with whole_or_nothing(output) as folder, contextlib.closing(open_source(source_path)) as source:
        return _convert(
            source,
            folder,
            format_name=format_name,
            dtype=dtype,
            overrides=overrides,
            split_projector=split_projector,
            name=name,
            console=console,
        )


def _convert(
    source: Source,
    folder: Path,
    *,
    format_name: str | None,
    dtype: str,
    overrides: Sequence[str],
    split_projector: bool,
    name: str | None,
    console: Console | None,
) -> ModelConfig:
    family, form = recognise(source, name=format_name)
    conversion = family.required_conversion()
    names = rename(source.entries, form)
    tensors = {new: source.entries[old].shape for new, old in names.names.items()}
    fields = conversion.fields(form.part, shapes=tensors, config=source.config)
    if split_projector:
        fields = conversion.split_projector(form.part, fields)
    if name is not None:
        fields = conversion.rename_encoder(form.part, fields, name=name)
    config = build_config(family.config_class, fields, overrides)
    parts = conversion.parts(config, form.part)
    shapes = conversion.param_shapes(config, parts)
    found = match(tensors, conversion.table(config, parts), shapes)
    unknown = [f"unknown: {name} {source.entries[name].shape}" for name in names.unknown]
    problems = [*source.problems, *names.problems, *unknown, *found.problems]
    if problems:
        raise ConversionError(sorted(problems))

    document = {"model": config_document(config, fields)}
    writer = _Arrays(source, names.names, dtype)
    params = writer.params(found, shapes)
    unused = writer.unused(found)
    total = sum(len(array.pieces) for array in (*params.values(), *unused.values()))
    with progress_bar(enabled=console is not None) as bar:
        written = bar.add_task("Writing tensors", total=total)
        write_checkpoint(
            folder,
            {"params": flax.traverse_util.unflatten_dict(params, sep="/"), "unused": unused},
            documents={
                "config": document,
                "source": {
                    "part": form.part,
                    "config": source.config,
                    "dtypes": {
                        new: source.entries[old].dtype.name for new, old in names.names.items()
                    },
                },
            },
            on_piece=lambda: bar.advance(written),
        )
    write_config(folder, document)
    copy_tokenizer(source.folder, folder / TOKENIZER_FOLDER)
    if console is not None:
        part_of = functools.partial(conversion.part_of, config)
        report(found, ignored=names.ignored, part_of=part_of, console=console)
    return config


def build_config(cls: type, fields: Fields, overrides: Sequence[str] = ()) -> Any:
    """The config `cls` of a family, with `--set` texts such as "llama.num_heads=2" on top.

    Raises:
        ConfigError: an override without "=", of a field that does not exist or of another type.
    """
    values = copy.deepcopy(fields)
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected FIELD=VALUE, such as llama.num_heads=2.")
        *groups, name = path.strip().split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {text}: '{group}' has no fields.")
        inner[name] = _literal(value.strip())
    return build(cls, values, where="--set")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def config_document(config: ModelConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config as JSON: what the checkpoint holds, and what differs from the default."""
    config_class: Any = type(config)  # whose fields all have defaults
    values, default = dataclasses.asdict(config), dataclasses.asdict(config_class())
    return {
        name: value
        for name, value in values.items()
        if name == "family" or name in fields or value != default[name]
    }


class _Arrays:
    """Makes the arrays of a checkpoint out of tensors in files."""

    def __init__(self, source: Source, names: Mapping[str, str], dtype: str):
        self._source, self._names, self._dtype = source, names, dtype

    def params(self, found: Match, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """`StreamedArray`s by path. A stack of several dtypes takes one that holds them all."""
        loads = [(load, self._entry(load.name)) for load in found.loads]
        count = Counter(entry.dtype for _, entry in loads)
        usual = count.most_common(1)[0][0]
        computed = {
            rule.target: rule.compute(usual) for rule in found.computed if rule.compute is not None
        }
        dtypes = {path: array.dtype for path, array in computed.items()}
        for load, entry in loads:
            path = load.rule.target
            dtypes[path] = jnp.promote_types(dtypes.get(path, entry.dtype), entry.dtype)
        if self._dtype != AS_IS:
            dtypes = dict.fromkeys(shapes, jnp.dtype(self._dtype))
        pieces: dict[str, list[Piece]] = {path: [] for path in shapes}
        for path, array in computed.items():
            pieces[path].append(Piece(functools.partial(array.astype, dtypes[path]), order=-1))
        for load, entry in loads:
            path = load.rule.target
            read = functools.partial(self._read, load.name, load.rule, dtypes[path])
            pieces[path].append(Piece(read, order=entry.order, row=load.row))
        return {
            path: StreamedArray(shape, dtypes.get(path, usual), pieces[path])
            for path, shape in shapes.items()
        }

    def unused(self, found: Match) -> dict[str, Any]:
        """`StreamedArray`s by name, in the dtype that they have."""
        rows: dict[str, int | None] = dict.fromkeys(found.kept)
        rows |= {load.name: load.rule.unused_rows for load in found.loads if load.rule.unused_rows}
        return {name: self._leading_rows(name, count) for name, count in rows.items()}

    def _leading_rows(self, name: str, count: int | None) -> StreamedArray:
        entry = self._entry(name)
        shape = entry.shape if count is None else (count, *entry.shape[1:])

        def read() -> np.ndarray:
            tensor = self._source.read(self._names[name])
            return tensor if count is None else tensor[:count]

        return StreamedArray(shape, entry.dtype, [Piece(read, order=entry.order)])

    def _entry(self, name: str) -> Entry:
        return self._source.entries[self._names[name]]

    def _read(self, name: str, rule: Rule, dtype: np.dtype) -> np.ndarray:
        tensor = self._source.read(self._names[name])
        if rule.unused_rows:
            tensor = tensor[rule.unused_rows :]
        with np.errstate(over="ignore"):  # said below
            cast = tensor.astype(dtype)
        if dtype == np.float16 and np.isinf(cast).any() and np.isfinite(tensor).all():
            raise ConfigError(f"{name} holds numbers too large for float16; use bfloat16.")
        if rule.padding_rows:
            cast = np.pad(cast, ((0, rule.padding_rows), *((0, 0),) * (cast.ndim - 1)))
        return rule.transform.load(cast)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what tokenizer files there are."""
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if files:
        target.mkdir(exist_ok=True)
    for file in files:
        shutil.copyfile(file, target / file.name)
