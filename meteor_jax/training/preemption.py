"""Ctrl-C and SIGTERM as something a loop asks about between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator
from typing import Any

import jax
from jax.experimental import multihost_utils

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked the run to end. Not an Exception, so that no one swallows it."""


class StopSignals:
    """While in context, the first SIGINT or SIGTERM is kept for `check`; a second one kills.

    With many processes a signal to any of them stops all at the same step: jax keeps SIGTERM and
    agrees with the others in the background (`start_processes(enable_preemption=True)`), so SIGINT
    becomes SIGTERM here.

    Off the main thread, where signals cannot be handled, it does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._raise_now = False
        self._together = jax.process_count() > 1
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            if self._together:
                self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._pass_on)}
            else:
                self._before = {each: signal.signal(each, self._handle) for each in STOP_SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else ""

    def check(self, step: int) -> None:
        """Raises Interrupted if a signal has come; to be called before every step.

        With many processes only at the step that all agreed on, within a second or two.
        """
        if self._together and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        if self.number is not None:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self, step: int) -> Generator[None]:
        """Lets a signal raise Interrupted right away: for long work that may be thrown away.

        With many processes such work is finished first.
        """
        self.check(step)
        self._raise_now = True
        try:
            yield
        finally:
            self._raise_now = False

    def _handle(self, number: int, _: Any) -> None:
        self.number = number
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if self._raise_now:
            raise Interrupted

    def _pass_on(self, number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
