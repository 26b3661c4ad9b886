"""Progress bars: on standard error, on a terminal only, and gone when done.

Each is a context that yields the function to report to. rich, which draws the bars, is imported on a terminal only: its
import takes 0.02 s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Update = Callable[[int, int], None]  # done, and in all


def byte_bar(label: str, *, shown: bool = True) -> AbstractContextManager[Update]:
    """A bar of bytes, their rate, and the time left."""
    return _bar(label, shown, of_bytes=True)


def window_bar() -> AbstractContextManager[Update]:
    """A bar of windows of a text."""
    return _bar("{task.completed}/{task.total} windows", True)


def request_bar(total: int, *, shown: bool = True) -> AbstractContextManager[Update]:
    """A bar of requests done."""
    return _bar("{task.completed}/{task.total} requests", shown, total=total)


@contextmanager
def _bar(text: str, shown: bool, *, of_bytes: bool = False, total: int | None = None) -> Iterator[Update]:
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    rates = (progress.DownloadColumn(), progress.TransferSpeedColumn()) if of_bytes else ()
    columns = (progress.TextColumn(text), progress.BarColumn(), *rates, progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
