"""A result file in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..schema import EngineResult, KernelResult, ResultFile
from .rows import block, environment, headline


def terminal() -> Console:
    """As wide as the terminal; 120 columns in a file."""
    return Console(highlight=False, width=None if Console().is_terminal else 120)


def grid(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], console: Console, names: int = 1) -> None:
    """Print a table, if it has rows: the first `names` columns to the left, the others to the right.

    Text goes through `Text`, so that brackets in it are no markup.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="cyan")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < names else "right", overflow="fold", min_width=14 * (i < names))
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    if table.row_count:
        console.print(table)


def render(file: ResultFile, console: Console) -> None:
    """Print the whole file."""
    about(file, console)
    for result in file.results:
        one(result, console)
    summary(file, console)


def summary(file: ResultFile, console: Console) -> None:
    """Print the few numbers that sum up the file, and who was missing, why, and how to get them."""
    console.print()
    for name, value in headline(file):
        console.print(Text(f"{name}: ").append(value, style="bold"))


def about(file: ResultFile, console: Console) -> None:
    """Print where and how it was measured."""
    for name, text in environment(file):
        console.print(Text(f"{name:12}", "cyan").append(text, "yellow" if name == "warning" else "default"))


def one(result: KernelResult | EngineResult, console: Console) -> None:
    """Print one result."""
    shown = block(result)
    console.print(Text(f"\n{shown.title}", style="bold").append(f"  {shown.sizes}", style="not bold dim"))
    timed: list[list[str | Text]] = [
        [Text(r.name, "bold" * r.ours), *(r.cells[c] for c in shown.columns)] for r in shown.rows if r.cells
    ]
    grid(("", *shown.columns), timed, console)
    for r in shown.rows:
        if r.note:
            console.print(Text(f"{r.name}: ", "bold" * r.ours).append(r.note, "red" if r.bad else "dim"))
