"""A result file in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..schema import EngineResult, KernelResult, ResultFile
from .rows import BAD, Block, blocks, environment, flop_unit, headline, kernel_block, missing, run_block


def terminal() -> Console:
    """As wide as the terminal; 120 columns in a file."""
    return Console(highlight=False, width=None if Console().is_terminal else 120)


def render(file: ResultFile, console: Console) -> None:
    """Print the whole file. Its text goes through `Text`, so that brackets in a message are no markup."""
    about(file, console)
    for block in blocks(file):
        _block(block, console)
    console.print()
    for name, value in headline(file):
        console.print(Text(f"{name}: ").append(value, style="bold"))
    for names, why in missing(file):
        console.print(Text(f"missing ({names}): {why}", style="dim"))


def about(file: ResultFile, console: Console) -> None:
    """Print where and how it was measured."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    for name, text in environment(file):
        grid.add_row(name, Text(text, style="yellow" if name == "interrupted" else ""))
    console.print(grid)


def one(file: ResultFile, result: KernelResult | EngineResult, console: Console) -> None:
    """Print one of its results."""
    _block(run_block(result) if isinstance(result, EngineResult) else kernel_block(result, *flop_unit(file)), console)
    if isinstance(result, KernelResult) and (g := result.gpu):
        held = f", held back {g.held_back:.0%} of the time" if g.held_back else ""
        power = f"{g.watts:.0f} W (at most {g.most_watts:.0f} of {g.limit_watts:.0f})"
        clock = f"{g.clock_mhz:.0f} MHz (at least {g.least_clock_mhz:.0f})"
        console.print(Text(f"{power}, {clock}, {g.celsius:.0f} °C{held}", style="dim"))


def _block(block: Block, console: Console) -> None:
    console.print()
    console.print(Text(block.title, style="bold").append(f"  {block.sizes}", style="not bold dim"))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="cyan")
    table.add_column("", min_width=14, overflow="fold")
    filled = [i for i in range(len(block.columns)) if any(row.cells and row.cells[i] for row in block.rows)]
    for i in filled:
        table.add_column(block.columns[i], justify="right", overflow="fold")
    for row in block.rows:
        if row.cells:
            table.add_row(Text(row.name, "bold" if row.ours else ""), *(Text(row.cells[i]) for i in filled))
    if table.row_count:
        console.print(table)
    for row in block.rows:
        if row.note:
            style = "red" if row.status in BAD else "dim"
            console.print(Text(f"{row.name}: ", style="bold" if row.ours else "").append(row.note, style))
