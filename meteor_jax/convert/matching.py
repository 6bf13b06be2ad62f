"""Tensors set against the tables: what goes where, and everything that does not fit."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table as Grid

from meteor_jax.models.conversion import Rule, Shape, Table


@dataclasses.dataclass(frozen=True)
class Load:
    """A tensor that becomes a parameter, or one `row` of a stacked one."""

    name: str
    rule: Rule
    row: int | None


@dataclasses.dataclass(frozen=True)
class Match:
    """What becomes of every tensor. Names are those of the table.

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
        if len(missing) > 1 and len(missing) == len(rule.layers or ()):
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
    found: Match,
    *,
    ignored: Mapping[str, str],
    part_of: Callable[[str], tuple[str, str]],
    console: Console,
) -> None:
    """Prints what became of every tensor: how many were loaded, why the others were not.

    Args:
        part_of: `Conversion.part_of` of the model.
    """
    grid = Grid("part", "tensors", "count", "what became of them")
    for part, count in Counter(_part(load.rule.target) for load in found.loads).items():
        grid.add_row(part, "", str(count), "loaded")
    for fate, reasons in (("kept aside", found.kept), ("left out", ignored)):
        by_reason: dict[tuple[str, str], list[str]] = {}
        for name, reason in reasons.items():
            part, local = part_of(name)
            by_reason.setdefault((part, reason), []).append(local)
        for (part, reason), names in by_reason.items():
            grid.add_row(part, _condense(names), str(len(names)), f"{fate}: {reason}")
    for rule in found.computed:
        grid.add_row(_part(rule.target), rule.target, "0", "computed")
    grid.add_row("", "", "0", "missing")
    console.print(grid)


def _part(path: str) -> str:
    return path.split("/")[0]


def _condense(names: Sequence[str]) -> str:
    """What many names have in common."""
    if len(names) == 1:
        return names[0]
    first, last = min(names), max(names)
    pairs = zip(first, last, strict=False)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
    return "".join(letter for letter, _ in same) + "…"
