"""Answers that are kept as they come, so that a run which was killed does not ask again.

A plan's `<plan>.jsonl` grows by whole batches. Every line names the fingerprint of what it depends
on; `<plan>.json` beside it says what the fingerprint stands for. Answers of another fingerprint
stay where they are, and the new ones go to `<plan>-<fingerprint>.jsonl`. In the end the file has
the questions that were asked; answers to others move to `<plan>.others.jsonl`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from meteor_jax.evaluation.files import file_name, json_line, write_lines, write_text
from meteor_jax.types import Array

SYNC_SECONDS = 5


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What answers depend on, by name; each part is something that JSON can hold."""

    parts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return digest(json.dumps(self.parts, sort_keys=True))


def digest(text: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_params(params: Any) -> str:
    """A digest of every parameter's bits, the same however they are sharded."""
    words = jax.device_get(_fold(params))
    leaves = jax.tree_util.tree_leaves_with_path(words)
    return digest(json.dumps([(jax.tree_util.keystr(path), int(word)) for path, word in leaves]))


@jax.jit
def _fold(params: Any) -> Any:
    """Of each array one uint32: its bits weighted by their places, which no sum order changes."""

    def fold(leaf: Array) -> Array:
        words = leaf if leaf.dtype.itemsize == 4 else leaf.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(words, jnp.uint32)
        place, stride = jnp.uint32(0), 1
        for axis in reversed(range(bits.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
            stride = stride * bits.shape[axis] % 2**32
        weight = (place + 1) * jnp.uint32(2654435761)
        return ((bits ^ (bits >> 15)) * (weight ^ (weight >> 13))).sum(dtype=jnp.uint32)

    return jax.tree.map(fold, params)


class Journal:
    """One plan's finished answers on disk.

    Attributes:
        path: of the answers; known after `start`.
        note: one line where what was there could not be used, or "".
    """

    def __init__(self, folder: Path, plan: str, *, fingerprint: Fingerprint):
        self.path = folder / f"{file_name(plan)}.jsonl"
        self.note = ""
        self._fingerprint = fingerprint
        self._usable: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}
        self._synced = time.monotonic()

    def start(self) -> dict[str, dict[str, Any]]:
        """The lines that can be used, by their "key"; what was cut off by the end of a process, or
        is no answer, is gone from the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._avoid_others()
        lines, torn = _read_lines(self.path)
        lines += _read_lines(self._others_path)[0]
        about = self._read_about()
        if about.get("fingerprint") == self._fingerprint.digest:
            self._seconds = dict(about["seconds"])
        usable = {
            line["key"]: line
            for line in lines
            if line.get("fingerprint") == self._fingerprint.digest and "key" in line
        }
        if torn or len(usable) < len(lines) or self._others_path.exists():
            write_lines(self.path, usable.values())
            self._others_path.unlink(missing_ok=True)
        self._write_about()
        self._usable = usable
        return usable

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Adds a batch. It outlives this process at once, a power cut after `SYNC_SECONDS`."""
        mark = {"fingerprint": self._fingerprint.digest}
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json_line(dict(line) | mark) for line in lines))
            file.flush()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(file.fileno())
                self._synced = time.monotonic()

    def finish(
        self, lines: Iterable[Mapping[str, Any]], *, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """Leaves exactly `lines`, in their order; the file is whole before and after.

        Returns `seconds` with those of earlier starts that came to their end added.
        """
        mark = {"fingerprint": self._fingerprint.digest}
        asked = [dict(line) | mark for line in lines]
        if others := self._usable.keys() - {line["key"] for line in asked}:
            write_lines(self._others_path, [self._usable[key] for key in sorted(others)])
        write_lines(self.path, asked)
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0) + value
        self._write_about()
        return self._seconds

    @property
    def _about_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def _others_path(self) -> Path:
        return self.path.with_suffix(".others.jsonl")

    def _avoid_others(self) -> None:
        """Takes another path where answers of another fingerprint are."""
        lines = _read_lines(self.path)[0] + _read_lines(self._others_path)[0]
        held = {line["fingerprint"] for line in lines if "fingerprint" in line}
        if held <= {self._fingerprint.digest}:
            return
        differs, taken = self._differences(self._read_about()), self.path
        # Not `with_stem`: a plan's name may have a dot.
        self.path = taken.with_name(
            f"{taken.name.removesuffix('.jsonl')}-{self._fingerprint.digest}.jsonl"
        )
        self.note = (
            f"{taken.name} is of another run ({differs}) and stays; these answers go to "
            f"{self.path.name}."
        )

    def _write_about(self) -> None:
        about = {"fingerprint": self._fingerprint.digest, "seconds": self._seconds}
        about |= dict(self._fingerprint.parts)
        write_text(self._about_path, json.dumps(about, indent=2) + "\n")

    def _read_about(self) -> dict[str, Any]:
        try:
            return json.loads(self._about_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _differences(self, before: Mapping[str, Any]) -> str:
        now = json.loads(json.dumps(dict(self._fingerprint.parts)))
        names = [name for name, part in now.items() if before.get(name) != part]
        return f"other {', '.join(names)}"


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Lines that are whole, and whether there was another."""
    if not path.is_file():
        return [], False
    lines = []
    *whole, rest = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for text in whole:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
    return lines, bool(rest) or len(lines) < len(whole)
