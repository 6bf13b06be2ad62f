"""Ctrl-C and SIGTERM as something a loop asks about between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked the run to end. Not an Exception, so that no one swallows it."""


class StopSignals:
    """While in context, the first SIGINT or SIGTERM is kept for `check`; a second one kills.

    Off the main thread, where signals cannot be handled, it does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._raise_now = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        return signal.Signals(self.number).name if self.number else ""

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets a signal raise Interrupted right away: for long work that may be thrown away."""
        self.check()
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
