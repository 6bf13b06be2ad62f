"""A trace of a few steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from meteor_jax.config import ConfigError
from meteor_jax.parallel.distributed import is_main_process

FOLDER = "profile"


def parse_range(text: str) -> range:
    """ "FIRST:LAST", both included, as steps.

    Raises:
        ConfigError: if it is anything else.
    """
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ConfigError(f"--profile={text}: expected FIRST:LAST, two steps, such as 20:24.")
    return range(int(first), int(last) + 1)


class StepProfiler:
    """Traces `steps` into `workdir`/profile, on process 0. Use as a context."""

    def __init__(self, workdir: Path, *, steps: range = range(0)) -> None:
        self._folder = Path(workdir) / FOLDER
        self._steps = steps if is_main_process() else range(0)
        self._running = False

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """To be called before every step."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """To be called after every step, with arrays that it computes."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
