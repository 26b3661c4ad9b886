"""Progress bars: on standard error, on a terminal only, and gone when done.

Each is a context that yields the function to report to. rich, which draws the bars, is imported on a terminal only: its
import takes 0.02 s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

Update = Callable[[int, int], None]  # done, and in all


@contextmanager
def byte_bar(label: str, *, shown: bool = True) -> Iterator[Update]:
    """A bar of bytes, their rate, and the time left."""
    if not (shown and _on_terminal()):
        yield _ignore
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _bar(*columns) as update:
        yield update


@contextmanager
def request_bar() -> Iterator[Update]:
    """A bar of requests done."""
    if not _on_terminal():
        yield _ignore
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    with _bar(TextColumn("{task.completed}/{task.total} requests"), BarColumn(), TimeRemainingColumn()) as update:
        yield update


@contextmanager
def _bar(*columns: ProgressColumn) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _ignore(done: int, total: int) -> None:
    """Without a terminal nothing is drawn."""
