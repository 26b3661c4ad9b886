"""A result file as Markdown."""

from __future__ import annotations

import re

from ..schema import ResultFile
from .rows import Block, Row, blocks, environment, headline, interrupted, missing


def render(file: ResultFile, level: int = 1) -> str:
    """All of it, under a heading of that level."""
    heading = "#" * level
    parts = [f"{heading} {_escape(title(file))}"]
    if interrupted(file):
        parts.append(f"**{interrupted(file)}**")
    parts.append("\n".join(f"- {name}: **{_escape(value)}**" for name, value in headline(file)))
    for block in blocks(file):
        parts += [f"{heading}# {_escape(block.title)}", _escape(block.sizes), _table(block)]
    if missing(file):
        parts += [f"{heading}# Missing", "\n".join(f"- {_escape(n)}: {_escape(why)}" for n, why in missing(file))]
    parts += [f"{heading}# Environment", "\n".join(f"- {n}: {_escape(text)}" for n, text in environment(file))]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(file: ResultFile) -> str:
    return f"{'Kernels' if file.kind == 'kernels' else 'Engine'} on {file.environment.chip}, {file.created[:10]}"


def _table(block: Block) -> str:
    lines = [_line(["", *block.columns]), _line(["---", *["---:"] * len(block.columns)])]
    return "\n".join([*lines, *(_row(row, len(block.columns)) for row in block.rows)])


def _row(row: Row, columns: int) -> str:
    name = f"**{_escape(row.name)}**" if row.ours else _escape(row.name)
    if row.note:
        name += f"<br>{_escape(row.note)}"
    cells = [_escape(cell.text) for cell in row.cells]
    return _line([name, *cells, *[""] * (columns - len(cells))])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    """One line, nothing in it read as Markdown or HTML. Underscores inside of words mean nothing to Markdown."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[|]|(?<!\w)_|_(?!\w))", r"\\\1", text)
