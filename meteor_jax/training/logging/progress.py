"""The progress bar of a training run, on process 0."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import Any

from rich.console import Console
from rich.progress import TextColumn

from meteor_jax.parallel.distributed import is_main_process
from meteor_jax.progress import progress_bar


class ProgressBar:
    """A bar with time left, loss and speed; plain lines where the output is no terminal."""

    def __init__(self, *, total: int, first_step: int) -> None:
        self._console = Console(file=sys.stderr, quiet=not is_main_process())
        self._total = total
        self._bar = progress_bar(
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            enabled=self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=first_step, numbers="")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
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
