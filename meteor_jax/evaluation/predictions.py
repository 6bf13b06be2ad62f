"""Predictions that are kept as they come, so that a run which was killed does not ask again.

A plan's `<plan>.jsonl` grows line by line. Every line names the fingerprint of what it depends
on; `<plan>.json` beside it says what the fingerprint stands for. Answers of another fingerprint
stay where they are, and the new ones go to `<plan>-<fingerprint>.jsonl`. In the end the file has
the questions that were asked; answers to others move to `<plan>.cache.jsonl`, the response cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from meteor_jax.evaluation.files import file_name, json_line, write_lines, write_text
from meteor_jax.evaluation.tasks.registry import Question
from meteor_jax.inference.engine.request import Prediction, Prompt
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


class PredictionStore:
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
        self._file: TextIO | None = None

    def start(self) -> dict[str, dict[str, Any]]:
        """The lines that can be used, by their "key"; what was cut off by the end of a process, or
        is no answer, is gone from the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._avoid_others()
        lines, torn = _read_lines(self.path)
        lines += _read_lines(self._cache_path)[0]
        about = self._read_about()
        if about.get("fingerprint") == self._fingerprint.digest:
            self._seconds = dict(about["seconds"])
        usable = {
            line["key"]: line
            for line in lines
            if line.get("fingerprint") == self._fingerprint.digest and "key" in line
        }
        if torn or len(usable) < len(lines) or self._cache_path.exists():
            write_lines(self.path, usable.values())
            self._cache_path.unlink(missing_ok=True)
        self._write_about()
        self._usable = usable
        return usable

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds a line. It outlives this process at once, a power cut after `SYNC_SECONDS`."""
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json_line(self._marked(line)))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def finish(
        self, lines: Iterable[Mapping[str, Any]], *, seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """Leaves exactly `lines`, in their order; the file is whole before and after.

        Returns `seconds` with those of earlier starts that came to their end added.
        """
        if self._file is not None:
            self._file.close()
        asked = list(map(self._marked, lines))
        if others := self._usable.keys() - {line["key"] for line in asked}:
            write_lines(self._cache_path, [self._usable[key] for key in sorted(others)])
        write_lines(self.path, asked)
        for name, value in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0) + value
        self._write_about()
        return self._seconds

    def _marked(self, line: Mapping[str, Any]) -> dict[str, Any]:
        return dict(line) | {"fingerprint": self._fingerprint.digest}

    @property
    def _about_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def _cache_path(self) -> Path:
        return self.path.with_suffix(".cache.jsonl")

    def _avoid_others(self) -> None:
        """Takes another path where answers of another fingerprint are."""
        lines = _read_lines(self.path)[0] + _read_lines(self._cache_path)[0]
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


def question_keys(questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[str]:
    """A name for each question that stays the same whatever else is asked beside it.

    It stands for the task, the record, the ids of the prompt (and so tokenizer, template and
    text) and the shape that it is asked in. A question that is there twice is counted.
    """
    seen: Counter[str] = Counter()
    keys = []
    for question, prompt in zip(questions, prompts, strict=True):
        task = question.task
        asked = (prompt.tokens, len(prompt.images), dataclasses.astuple(prompt.bucket))
        key = digest(repr((task.source, task.name, question.record, question.question_id, asked)))
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return keys


def known_note(plan: str, known: Collection[Prediction], *, total: int, batch_rows: int) -> str:
    """One line about predictions that are not made again.

    Args:
        batch_rows: prompts of a batch on one shard now.
    """
    line = f"{plan}: {len(known)} of {total} questions were answered before"
    sizes = [found.batch_rows for found in known if not found.unreadable]
    if other := [size for size in sizes if size != batch_rows]:
        line += (
            f", {len(other)} of them in batches of {', '.join(map(str, sorted(set(other))))} "
            f"instead of {batch_rows}: their tokens computed, TFLOPs and seconds are of those"
        )
    return f"{line}."
