"""Which layout a checkpoint has, and its tensors under the names of the family's tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from meteor_jax.config import suggest
from meteor_jax.convert.sources import Source
from meteor_jax.models.conversion import ConversionError, Format
from meteor_jax.models.family import Family, all_families


def all_formats() -> dict[str, tuple[type[Family], Format]]:
    """Every format by name, with the family that reads it."""
    return {
        name: (family, form)
        for family in all_families().values()
        if family.conversion is not None
        for name, form in family.conversion.formats.items()
    }


def recognise(source: Source, *, name: str | None = None) -> tuple[type[Family], Format]:
    """The format called `name`, or the one that config.json or the tensors' names betray, and the
    family that reads it.

    Raises:
        ConversionError: for an unknown name, or a checkpoint of no known format.
    """
    formats, model_type = all_formats(), source.config.get("model_type")
    if name is not None:
        if name not in formats:
            raise ConversionError([f"--format {name}: no such format.{suggest(name, formats)}"])
        return formats[name]
    marked = [
        (family, form)
        for family, form in formats.values()
        if any(re.match(form.mark, name) for name in source.entries)
    ]
    named = [found for found in marked if model_type in found[1].model_types]
    for found in (*named, *marked):
        return found
    some = ", ".join(sorted(source.entries)[:3])
    raise ConversionError(
        [
            f"{source.folder}: of no known format (model_type {model_type!r}, tensors {some}, …); "
            f"name one with --format: {', '.join(formats)}."
        ]
    )


@dataclasses.dataclass(frozen=True)
class Renamed:
    """Tensors under the names of the tables.

    Attributes:
        names: the table's name → the name in the file.
        ignored: the name in the file → why it is left out.
        unknown: names in the file that the format does not have.
        problems: two tensors that would get one name.
    """

    names: Mapping[str, str]
    ignored: Mapping[str, str]
    unknown: tuple[str, ...]
    problems: tuple[str, ...]


def rename(names: Iterable[str], form: Format) -> Renamed:
    """Translates a format's names into those of the family's tables."""
    renamed: dict[str, str] = {}
    ignored: dict[str, str] = {}
    unknown, problems = [], []
    for name in names:
        new = _first_match(name, form.renames)
        if new is None:
            reason = _first_match(name, form.ignored)
            if reason is None:
                unknown.append(name)
            else:
                ignored[name] = reason
        elif new in renamed:
            problems.append(f"twice: {name} and {renamed[new]} both mean {new}")
        else:
            renamed[new] = name
    return Renamed(renamed, ignored, tuple(unknown), tuple(problems))


def _first_match(name: str, patterns: Iterable[tuple[str, Any]]) -> str | None:
    for pattern, replacement in patterns:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None
