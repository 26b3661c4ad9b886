"""Result files as one page that loads nothing, and is read at any width: on a narrow screen a row becomes a card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from ..schema import ResultFile
from .rows import Block, block, environment, headline

HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Benchmarks</title><style>
:root { color-scheme: light dark } body { font: 15px/1.45 system-ui, sans-serif; margin: 1rem auto; max-width: 72rem;
padding: 0 1rem; overflow-wrap: anywhere } h2 { font-size: 1.3rem; margin-top: 2rem }
h3 { font-size: 1rem; margin: 1.4rem 0 0 } small, th, .note { color: #777 } small { white-space: pre-line }
table { border-collapse: collapse; width: 100% } th { font-weight: normal; text-align: right }
th, td { padding: .15rem .5rem; border-bottom: 1px solid #8884 } td + td { text-align: right; white-space: nowrap }
.ours td:first-child { font-weight: bold } .bad { color: #c22 } td.note { text-align: left; white-space: normal }
p { margin: .2rem 0 } @media (max-width: 46rem) { thead { display: none }
tr { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .4rem 0; border-bottom: 1px solid #8884 }
td { border: 0; padding: 0 } td:first-child { flex: 0 0 100% }
td[title]::before { content: attr(title) " "; color: #777 } }
</style></head><body>"""


def render(files: Sequence[ResultFile]) -> str:
    return "\n".join([HEAD, *(line for file in files for line in _file(file)), "</body></html>\n"])


def _file(file: ResultFile) -> Iterator[str]:
    name = f"{file.kind.capitalize()} on {file.environment.chip}, {file.created[:10]}"
    yield f"<h2>{escape(name)}</h2>"
    yield from (f"<p><small>{escape(a)}:</small> {escape(b)}</p>" for a, b in (*headline(file), *environment(file)))
    for result in file.results:
        yield from _block(block(result))


def _block(shown: Block) -> Iterator[str]:
    yield f"<h3>{escape(shown.title)}</h3><small>{escape(shown.sizes.strip())}</small><table>"
    yield f"<thead><tr><th></th>{''.join(f'<th>{escape(column)}</th>' for column in shown.columns)}</tr></thead>"
    for row in shown.rows:
        cells = [f'<td title="{escape(name)}">{escape(row.cells[name])}</td>' for name in shown.columns if row.cells]
        note = f'<td class="note{" bad" * row.bad}" colspan="{len(shown.columns)}">{escape(row.note)}</td>'
        yield f"<tr{' class=ours' * row.ours}><td>{escape(row.name)}</td>{''.join(cells) or note}</tr>"
    yield "</table>"
