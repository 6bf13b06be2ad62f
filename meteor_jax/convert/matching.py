"""Tensors set against the tables: what goes where, and everything that does not fit."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table as Grid

from meteor_jax.convert.rules import Rule, Table
from meteor_jax.convert.tables import (
    PROJECTOR,
    TABLES,
    TOWER,
    llama_table,
    projector_table,
    split_projector_tables,
)
from meteor_jax.models.decoders.llama.model import Llama
from meteor_jax.models.eagle.model import ENCODERS, MeteorConfig
from meteor_jax.models.eagle.projector import Projector

Shape = tuple[int, ...]


def parts_of(config: MeteorConfig, part: str) -> tuple[str, ...]:
    """The top-level parameters that a checkpoint of `part` (see `Format.part`) fills."""
    if part == "projector" and config.fusion == "pre":
        return ("projector",)
    projectors = tuple(f"projector_{name}" for name in config.encoders)
    if part == "projector":
        return projectors
    if part != "eagle":
        return (part,)
    joint = ("projector",) if config.fusion == "pre" else projectors
    return (*config.encoders, *joint, "llama")


def tables_of(config: MeteorConfig, parts: Sequence[str]) -> Table:
    """The rows of all tables for some top-level parameters of a model."""
    whole = Table(())
    for index, name in enumerate(config.encoders):
        if name in parts:
            table = TABLES[name](config.encoder(name))
            whole += table.under(source=TOWER.replace("{n}", str(index)), target=name)
    if "projector" in parts:
        whole += projector_table().under(source=PROJECTOR, target="projector")
    if any(part.startswith("projector_") for part in parts):
        widths = {name: config.encoder(name).width for name in config.encoders}
        split = split_projector_tables(widths, out_width=config.llama.width)
        for name, table in split.items():
            whole += table.under(source=PROJECTOR, target=f"projector_{name}")
    if "llama" in parts:
        table = llama_table(config.llama)
        rules = tuple(
            dataclasses.replace(rule, target=f"llama/{rule.target}") for rule in table.rules
        )
        whole += Table(rules, table.unused)
    return whole


def param_shapes(config: MeteorConfig, parts: Iterable[str]) -> dict[str, Shape]:
    """Shapes of some top-level parameters, by path; nothing is computed."""
    return {
        f"{part}/{path}": shape
        for part in parts
        for path, shape in _shapes_of_part(config, part).items()
    }


@functools.cache
def _shapes_of_part(config: MeteorConfig, part: str) -> dict[str, Shape]:
    if part in ENCODERS:
        image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
        init, x = ENCODERS[part](config.encoder(part)).init, image
    elif part == "llama":
        init, x = _llama_init(config), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    else:
        owner = part.removeprefix("projector_")  # itself where all encoders share one
        width = sum(config.encoder(e).width for e in config.encoders if owner in (e, part))
        init, x = Projector(config.llama.width).init, jax.ShapeDtypeStruct((1, width), jnp.float32)
    params = jax.eval_shape(init, jax.random.key(0), x)["params"]
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def _llama_init(config: MeteorConfig) -> Any:
    def run(llama: Llama, tokens: jax.Array) -> jax.Array:
        return llama.logits(llama.run(llama.embed(tokens), tokens, start=0, stop=1).x)

    llama = Llama(config.llama)
    return lambda key, tokens: llama.init(key, tokens, method=run)


@dataclasses.dataclass(frozen=True)
class Load:
    """A tensor that becomes a parameter, or one `row` of a stacked one."""

    name: str
    rule: Rule
    row: int | None


@dataclasses.dataclass(frozen=True)
class Match:
    """What becomes of every tensor. Names are EAGLE's.

    Attributes:
        loads: what is read; a tensor that fills several parameters comes several times.
        kept: tensors without a parameter, with the reason; they are kept beside the parameters.
        computed: rows of the tables that no tensor fills, but a formula does.
        problems: unknown and missing tensors, wrong shapes.
    """

    loads: tuple[Load, ...]
    kept: Mapping[str, str]
    computed: tuple[Rule, ...]
    problems: tuple[str, ...]


def match(tensors: Mapping[str, Shape], table: Table, shapes: Mapping[str, Shape]) -> Match:
    """Sets tensors, given by shape, against a table.

    Args:
        shapes: of the parameters that the table fills (`param_shapes`).
    """
    loads, computed, problems, known = [], [], [], set()
    for rule in table.rules:
        want, missing = rule.source_shape(shapes[rule.target]), []
        for name, row in rule.expand():
            known.add(name)
            found = next((n for n in (name, *rule.fallbacks) if n in tensors), None)
            if found is None and rule.compute is not None:
                computed.append(rule)
            elif found is None:
                missing.append(name)
            elif tuple(tensors[found]) != want:
                problems.append(f"wrong shape: {found}: expected {want}, got {tensors[found]}")
            else:
                loads.append(Load(found, rule, row))
        if len(missing) > 1 and len(missing) == len(rule.layers):
            missing = [f"{rule.source} of all layers"]
        problems += [f"missing: {name} {want}" for name in missing]
    kept: dict[str, str] = {}
    for name in tensors:
        if name not in known:
            reason = next((u.reason for u in table.unused if re.fullmatch(u.pattern, name)), None)
            if reason is None:
                problems.append(f"unknown: {name} {tensors[name]}")
            else:
                kept[name] = reason
    # A tensor that fills several parameters is named once.
    return Match(tuple(loads), kept, tuple(computed), tuple(dict.fromkeys(problems)))


def report(
    found: Match, *, ignored: Mapping[str, str], encoders: Sequence[str], console: Console
) -> None:
    """Prints what became of every tensor: how many were loaded, why the others were not."""
    grid = Grid("part", "tensors", "count", "what became of them")
    for part, count in Counter(_part(load.rule.target) for load in found.loads).items():
        grid.add_row(part, "", str(count), "loaded")
    for fate, reasons in (("kept aside", found.kept), ("left out", ignored)):
        by_reason: dict[tuple[str, str], list[str]] = {}
        for name, reason in reasons.items():
            part, local = _local(name, encoders)
            by_reason.setdefault((part, reason), []).append(local)
        for (part, reason), names in by_reason.items():
            grid.add_row(part, _condense(names), str(len(names)), f"{fate}: {reason}")
    for rule in found.computed:
        grid.add_row(_part(rule.target), rule.target, "0", "computed")
    grid.add_row("", "", "0", "missing")
    console.print(grid)


def _part(path: str) -> str:
    return path.split("/")[0]


def _local(name: str, encoders: Sequence[str]) -> tuple[str, str]:
    """A tensor's part of the model, and its name within it."""
    match = re.fullmatch(r"model\.vision_tower\.vision_towers\.(\d+)\.vision_tower\.(.*)", name)
    return (encoders[int(match[1])], match[2]) if match else ("", name)


def _condense(names: Sequence[str]) -> str:
    """What many names have in common."""
    if len(names) == 1:
        return names[0]
    first, last = min(names), max(names)
    pairs = zip(first, last, strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return "".join(letter for letter, _ in same) + "…"
