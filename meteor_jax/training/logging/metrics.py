"""metrics.jsonl and TensorBoard. With many processes only process 0 writes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from meteor_jax.parallel.distributed import is_main_process

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """metrics.jsonl, one object a step, and TensorBoard files beside it.

    A run that resumes at a step first drops the lines from there on, so that the file is that of
    a run that was never interrupted. Use as a context.
    """

    def __init__(self, workdir: Path, *, first_step: int) -> None:
        path, writes = Path(workdir) / METRICS_FILE, is_main_process()
        if writes:
            cut_lines(path, first_step=first_step)
        self._file = (path if writes else Path(os.devnull)).open("a")
        self._board = SummaryWriter(
            str(Path(workdir) / "tb"), purge_step=first_step, write_to_disk=writes
        )

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._board.close()

    def write_steps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows, each with a `step`; the last one also goes to TensorBoard."""
        for row in rows:
            self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if rows:
            numbers = {k: v for k, v in rows[-1].items() if isinstance(v, float)}
            self.write_scalars(
                {k if k.startswith("held_out") else f"train/{k}": v for k, v in numbers.items()},
                step=rows[-1]["step"],
            )

    def write_scalars(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Sends numbers to TensorBoard alone."""
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()


def cut_lines(path: Path, *, first_step: int) -> None:
    """Drops from a metrics.jsonl the steps from `first_step` on, and a line torn by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < first_step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
