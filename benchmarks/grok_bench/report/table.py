"""A result file in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..schema import KernelResult, ResultFile
from .rows import Block, blocks, environment, headline, interrupted, missing

NAME = 18  # columns that a name has at least
HEADS = {"of roofline": "of, roofline", "× best peer": "×, best peer", "output tokens/s": "output, tokens/s"}
STYLES = {"wrong": "bold red", "failed": "bold red", "timeout": "red", "missing": "dim"}


def render(file: ResultFile, console: Console) -> None:
    """Print all of it; nothing in it is read as markup."""
    about(file, console)
    if interrupted(file):
        console.print(Text(interrupted(file), style="yellow"))
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
        grid.add_row(name, Text(text))
    console.print(grid)


def one(file: ResultFile, result: KernelResult, console: Console) -> None:
    """Print one of its results."""
    for block in blocks(replace(file, results=[result])):
        _block(block, console)
    if g := result.gpu:
        held = f", held back {g.held_back:.0%} of the time" if g.held_back else ""
        text = f"{g.watts:.0f} W (at most {g.most_watts:.0f} of {g.limit_watts:.0f}), {g.clock_mhz:.0f} MHz (at least "
        console.print(Text(f"{text}{g.least_clock_mhz:.0f}), {g.celsius:.0f} °C{held}", style="dim"))


def _block(block: Block, console: Console) -> None:
    console.print()
    console.print(Text(block.title, style="bold").append(f"  {block.sizes}", style="not bold dim"))
    fits = next((b for b in (block, _without(block, "error")) if _width(b) <= console.width), None)
    if fits is None:  # rather lines than a table that cuts numbers off
        for line in _lines(block):
            console.print(line)
    elif any(row.cells for row in fits.rows):
        console.print(_table(fits))
    for note in _notes(block):
        console.print(note)


def _heads(block: Block) -> list[list[str]]:
    """The lines of each column's head."""
    return [HEADS.get(column, column).split(", ") for column in block.columns]


def _width(block: Block) -> int:
    """Of the table that shows all, with names wrapped."""
    widths = [max(map(len, lines)) for lines in _heads(block)]
    for row in block.rows:
        if row.cells:
            widths = [max(w, len(cell.text)) for w, cell in zip(widths, row.cells, strict=True)]
    return NAME + sum(2 + w for w in widths)


def _without(block: Block, column: str) -> Block:
    kept = [i for i, name in enumerate(block.columns) if name != column]
    rows = [replace(row, cells=tuple(row.cells[i] for i in kept) if row.cells else ()) for row in block.rows]
    return replace(block, columns=tuple(block.columns[i] for i in kept), rows=rows)


def _table(block: Block) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan")
    table.add_column("", min_width=NAME, overflow="fold")
    for lines in _heads(block):
        table.add_column("\n".join(lines), justify="right", no_wrap=True)
    for row in block.rows:
        if row.cells:
            table.add_row(Text(row.name, style="bold" if row.ours else ""), *(Text(cell.text) for cell in row.cells))
    return table


def _lines(block: Block) -> Iterator[Text]:
    for row in block.rows:
        cells = [f"{c} {cell.text}" for c, cell in zip(block.columns, row.cells, strict=False) if cell.text]
        if cells:
            yield Text(f"{row.name}: ", style="bold" if row.ours else "").append(", ".join(cells), style="not bold")


def _notes(block: Block) -> Iterator[Text]:
    """What there is to say of rows that have no times, or not all of them."""
    for row in block.rows:
        if row.note:
            yield Text(f"{row.name}: ", style="bold" if row.ours else "").append(row.note, STYLES.get(row.status, ""))
