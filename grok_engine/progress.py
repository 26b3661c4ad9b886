"""Progress bars: on standard error, on a terminal only, and gone when done."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def bar(*columns: ProgressColumn, shown: bool = True) -> Progress:
    """A bar with these columns."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


def byte_bar(label: str, *, shown: bool = True) -> Progress:
    """A bar of bytes, their rate, and the time left."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return bar(*columns, shown=shown)


def request_bar() -> Progress:
    """A bar of requests done."""
    return bar(TextColumn("{task.completed}/{task.total} requests"), BarColumn(), TimeRemainingColumn())
