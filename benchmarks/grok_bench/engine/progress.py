"""The progress of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def request_progress(total: int, what: str = "requests") -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, drawn by the caller, twice a second at most: no thread disturbs a measurement."""
    console = Console(stderr=True)
    columns = (TextColumn(f"{{task.completed}}/{{task.total}} {what}"), BarColumn(), TimeRemainingColumn())
    shown = console.is_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not shown) as bar:
        task = bar.add_task("", total=total)
        drawn = 0.0

        def show(done: int) -> None:
            nonlocal drawn
            if shown and time.monotonic() - drawn >= 0.5:
                bar.update(task, completed=done, refresh=True)
                drawn = time.monotonic()

        yield show
