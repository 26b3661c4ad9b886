"""Result files as one page that loads nothing: figures inside, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..schema import ResultFile
from . import figures
from .markdown import title
from .page_parts import SCRIPT, STYLE
from .rows import Block, Row, blocks, environment, headline, interrupted, missing


def render(named: Sequence[tuple[str, ResultFile]]) -> str:
    """The page of the files (by name). MissingLibrary without matplotlib."""
    figures.require()
    from .style import DARK, LIGHT

    light, dark = (";".join(f"--{role}:{colour}" for role, colour in t.roles().items()) for t in (LIGHT, DARK))
    heading = title(named[0][1]) if len(named) == 1 else "Benchmarks"
    sections = "\n".join(_section(i, name, file, len(named) > 1) for i, (name, file) in enumerate(named))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(heading)}</title>
<style>
:root{{{light}}}
@media (prefers-color-scheme: dark){{:root{{{dark}}}}}
{STYLE}
</style>
</head>
<body>
<main>
<h1>{escape(heading)}</h1>
{sections}
</main>
<script>
{SCRIPT}
</script>
</body>
</html>
"""


def _section(number: int, name: str, file: ResultFile, headed: bool) -> str:
    parts = [f"<h2>{escape(title(file))}</h2>"] if headed else []
    if interrupted(file):
        parts.append(f'<p class="bad">{escape(interrupted(file))}</p>')
    parts.append(_tiles(file))
    for i, picture in enumerate(figures.pictures(file)):
        svg = figures.inline_svg(picture, f"f{number}-{i}", picture.title)
        figure = f'<figure><div class="wide">{svg}</div></figure>'
        folded = picture.name.startswith("timeline-")
        parts.append(f"<details><summary>{escape(picture.title)}</summary>{figure}</details>" if folded else figure)
    parts.append("<h3>All results</h3>")
    parts.append(_kernel_table(blocks(file)) if file.kind == "kernels" else "".join(map(_engine_table, blocks(file))))
    if missing(file):
        items = "".join(f"<li><b>{escape(names)}</b>: {escape(why)}</li>" for names, why in missing(file))
        parts.append(f"<h3>Missing</h3><ul>{items}</ul>")
    facts = "".join(f"<dt>{escape(what)}</dt><dd>{escape(text)}</dd>" for what, text in environment(file))
    parts.append(f"<h3>How it was measured</h3><dl>{facts}<dt>file</dt><dd>{escape(name)}</dd></dl>")
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _tiles(file: ResultFile) -> str:
    tiles = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for what, value in headline(file))
    return f'<div class="tiles">{tiles}</div>'


def _kernel_table(found: Sequence[Block]) -> str:
    """One table of all problems, so that it can be sorted across them."""
    if not found:
        return "<p>There are none.</p>"
    rows = [_row([block.title], row, len(block.columns), block.sizes) for block in found for row in block.rows]
    return _table(("problem", "contestant", *found[0].columns), 2, rows)


def _engine_table(block: Block) -> str:
    rows = [_row([], row, len(block.columns)) for row in block.rows]
    return f"<p>{escape(block.title)}: {escape(block.sizes)}</p>{_table(('run', *block.columns), 1, rows)}"


def _table(columns: Sequence[str], names: int, rows: Sequence[str]) -> str:
    number = ' class="n"'
    heads = "".join(f'<th scope="col"{number if i >= names else ""}>{escape(c)}</th>' for i, c in enumerate(columns))
    body = "\n".join(rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _row(before: Sequence[str], row: Row, columns: int, sizes: str = "") -> str:
    cells = "".join(f'<td title="{escape(sizes)}">{escape(text)}</td>' for text in before)
    name = f"<b>{escape(row.name)}</b>" if row.ours else escape(row.name)
    if not row.cells:
        bad = ' class="bad"' if row.status in ("wrong", "failed", "timeout") else ""
        return f'<tr>{cells}<td>{name}</td><td colspan="{columns}"{bad}>{escape(row.note)}</td></tr>'
    if row.note:
        name += f'<br><span class="bad">{escape(row.note)}</span>'
    cells += f"<td>{name}</td>"
    for cell in row.cells:
        value = "" if cell.value is None else f' data-value="{cell.value!r}"'
        cells += f'<td class="n"{value}>{escape(cell.text)}</td>'
    ours = ' class="ours"' if row.ours else ""
    return f"<tr{ours}>{cells}</tr>"
