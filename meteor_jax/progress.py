"""Progress bars of one look, on standard error unless a console is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


def progress_bar(
    *columns: ProgressColumn, console: Console | None = None, enabled: bool = True
) -> Progress:
    """Bars with what is done, the time taken and the time left; `columns` follow them."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *columns,
        console=console or Console(stderr=True),
        disable=not enabled,
    )


def track(items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
    """The items, with a bar for how many were taken; `total` where they have no length."""
    with progress_bar() as bar:
        yield from bar.track(items, total=total, description=description)
