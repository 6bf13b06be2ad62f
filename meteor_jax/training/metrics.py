"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and a progress bar."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
STEPS_AHEAD = 2  # steps that may wait on the device: enough to keep it busy, few enough to hold


class TrainingFailed(RuntimeError):
    """The loss is no longer a number. The message is one line."""


class MetricsLog:
    """metrics.jsonl, one object a step, and TensorBoard files beside it.

    A run that resumes at a step first drops the lines from there on, so that the file is that of
    a run that was never interrupted. Use as a context.
    """

    def __init__(self, workdir: Path, *, first_step: int) -> None:
        path = Path(workdir) / METRICS_FILE
        cut_lines(path, first_step=first_step)
        self._file = path.open("a")
        self._board = SummaryWriter(str(Path(workdir) / "tb"), purge_step=first_step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        self._board.close()

    def write_steps(self, rows: list[Mapping[str, Any]]) -> None:
        """Appends rows, each with a `step`; the last one also goes to TensorBoard."""
        for row in rows:
            self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if rows:
            numbers = {k: v for k, v in rows[-1].items() if isinstance(v, float)}
            self.write_scalars({f"train/{k}": v for k, v in numbers.items()}, step=rows[-1]["step"])

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


class ProgressBar:
    """A bar with time left, loss and speed; plain lines where the output is no terminal."""

    def __init__(self, *, total: int, first_step: int) -> None:
        self._console = Console(file=sys.stderr)
        self._total = total
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=first_step, numbers="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the terminal to another bar."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def show(self, stage: str, *, step: int, loss: float, examples_per_s: float) -> None:
        """Says that `step` steps are done."""
        numbers = f"loss {loss:.4f}  {examples_per_s:.1f} examples/s"
        self._bar.update(self._task, description=stage, completed=step, numbers=numbers)
        if not self._console.is_terminal:
            left = self._bar.tasks[0].time_remaining
            eta = f"{left / 60:.1f} min left" if left is not None else ""
            self.say(f"{stage}  step {step}/{self._total}  {numbers}  {eta}")

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step whose metrics are still on the device."""

    row: dict[str, Any]
    metrics: dict[str, jax.Array]
    example_id: np.ndarray


class StepRecorder:
    """Keeps metrics on the device until `flush`, so that no step waits for the host."""

    def __init__(self, log: MetricsLog, bar: ProgressBar) -> None:
        self._log = log
        self._bar = bar
        self._pending: list[_Pending] = []
        self._since = time.perf_counter()

    def add(
        self, metrics: dict[str, jax.Array], *, row: dict[str, Any], example_id: np.ndarray
    ) -> None:
        """Takes in one step: `row` is what the host knows of it (step, stage, plan, examples)."""
        self._pending.append(_Pending(row, metrics, example_id))
        if len(self._pending) > STEPS_AHEAD:
            jax.block_until_ready(self._pending[-1 - STEPS_AHEAD].metrics)

    def flush(self) -> None:
        """Fetches and writes what is pending; rates are means over those steps.

        Raises:
            TrainingFailed: naming the first step whose loss or gradient is not finite, and its
                examples.
        """
        if not self._pending:
            return
        fetched = jax.device_get([pending.metrics for pending in self._pending])
        seconds = time.perf_counter() - self._since
        examples = sum(pending.row["examples"] for pending in self._pending)
        rates = {
            "examples_per_s": examples / seconds,
            "tokens_per_s": sum(float(metrics["tokens"]) for metrics in fetched) / seconds,
        }
        rows = [
            pending.row | {name: value.item() for name, value in metrics.items()} | rates
            for pending, metrics in zip(self._pending, fetched, strict=True)
        ]
        failed = [
            i for i, row in enumerate(rows) if not math.isfinite(row["loss"] + row["grad_norm"])
        ]
        # JSON has no NaN: the failed step is in the message instead.
        self._log.write_steps(rows[: failed[0]] if failed else rows)
        if failed:
            row, example_id = rows[failed[0]], self._pending[failed[0]].example_id
            raise TrainingFailed(
                f"loss is {row['loss']:.4g} at step {row['step']}, its gradient's norm "
                f"{row['grad_norm']:.4g} (stage {row['stage']}, plan {row['plan']}, learning rate "
                f"{row['learning_rate']:.3g}; examples "
                f"{', '.join(map(str, example_id))}): lower the learning rate, or look at these "
                "examples; the last checkpoint is from before."
            )
        self._pending.clear()
        self._bar.show(
            rows[-1]["stage"], step=rows[-1]["step"] + 1, loss=rows[-1]["loss"],
            examples_per_s=rates["examples_per_s"],
        )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out of the rates what happened since the last step."""
        self._since = time.perf_counter()
