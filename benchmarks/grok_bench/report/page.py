"""Result files as one page that loads nothing: what the terminal shows, under the figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape

from rich.console import Console

from ..schema import ResultFile
from . import figure, table
from .rows import best_of_ours, title

FORMAT = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{name}</title>
<style>{{stylesheet}}</style></head>
<body style="margin: 2em">
{picture}
<pre style="font-family: monospace">{{code}}</pre>
</body>
</html>
"""


def render(files: Sequence[ResultFile]) -> str:
    """MissingLibrary without matplotlib. Without a peer's time there is no figure."""
    console = Console(record=True, width=160, file=io.StringIO(), highlight=False)
    for file in files:
        console.rule(title(file))
        table.render(file, console)
    raced = any((s := best_of_ours(r)) and s.speedup for file in files for r in file.kernels)
    picture = figure.svg(files).replace("{", "{{").replace("}", "}}") if raced else ""
    name = escape(title(files[0]) if len(files) == 1 else "Benchmarks")
    return console.export_html(code_format=FORMAT.format(name=name, picture=picture))
