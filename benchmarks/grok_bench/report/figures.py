"""Figures of result files: which there are, drawn in a theme, and written as SVG and PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..schema import ResultFile


class MissingLibrary(ValueError):
    """A library that only figures need is not installed."""


@dataclass(frozen=True)
class Picture:
    """A figure still to be drawn: `draw(theme)` makes it."""

    name: str  # of its file, after that of the results
    title: str
    draw: Callable[[Any], Any]


def require() -> None:
    """MissingLibrary, with what to install, where figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingLibrary("figures need matplotlib: pip install 'grok-engine[bench]'") from None


def pictures(file: ResultFile) -> list[Picture]:
    """Those that the results can fill: none stands empty. MissingLibrary without matplotlib."""
    require()
    from . import engine_figures, kernel_figures

    found = kernel_figures.all_of(file) if file.kind == "kernels" else engine_figures.all_of(file)
    return [Picture(*parts) for parts in found]


def write(named: Sequence[tuple[str, ResultFile]], folder: Path) -> list[Path]:
    """Every figure of the files (by name) as NAME-FIGURE-{light,dark}.{svg,png}."""
    require()
    from .style import THEMES, themed

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, picture in ((stem, picture) for stem, file in named for picture in pictures(file)):
        for theme in THEMES:
            with themed(theme):
                figure = picture.draw(theme)
                path = folder / f"{stem}-{picture.name}-{theme.name}.svg"
                path.write_text(_svg(figure), encoding="utf-8")
                figure.savefig(path.with_suffix(".png"), dpi=200)
                written += [path, path.with_suffix(".png")]
    return written


def _svg(figure: Any) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=SILENT)
    # where the font is not, one of the same widths
    return file.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


SILENT = {"Date": None, "Creator": None, "Format": None, "Type": None}  # the same results give the same bytes


def inline_svg(picture: Picture, prefix: str, label: str) -> str:
    """An <svg> element for a page of several: ids begin with `prefix`, colours are the variables --ROLE."""
    from .style import LIGHT, themed

    with themed(LIGHT):
        svg = _svg(picture.draw(LIGHT))
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for role, colour in LIGHT.roles().items():
        svg = svg.replace(colour, f"var(--{role})")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    # without a width in points the page decides
    return f'<svg {box[0]} role="img" aria-label="{escape(label)}">' + svg[svg.index(">") + 1 :]
