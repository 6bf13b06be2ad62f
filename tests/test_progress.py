"""Progress bars: counts on a terminal, one line at the end elsewhere, nothing where disabled."""

import io

import pytest
from rich.console import Console
from rich.progress import TextColumn

from meteor_jax.progress import progress_bar, track


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_what_is_done_and_its_own_columns(terminal):
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=terminal)
    with progress_bar(TextColumn("{task.fields[numbers]}"), console=console) as bar:
        task = bar.add_task("sam[b]", total=4, numbers="")
        bar.update(task, completed=3, numbers="loss 0.5")
    assert all(word in out.getvalue() for word in ("sam[b]", "3/4", "loss 0.5"))
    if not terminal:
        assert out.getvalue().count("\n") == 1


def test_a_disabled_bar_prints_nothing():
    out = io.StringIO()
    with progress_bar(console=Console(file=out), enabled=False) as bar:
        assert list(bar.track(range(3), description="x")) == [0, 1, 2]
    assert out.getvalue() == ""


def test_tracked_items_come_through_and_are_counted_on_standard_error(capsys):
    assert list(track(iter("abc"), "reading", total=3)) == ["a", "b", "c"]
    said = capsys.readouterr()
    assert said.out == "" and "reading" in said.err and "3/3" in said.err
