"""`grok-engine bench compare` and `grok-engine bench report`."""

from __future__ import annotations

from pathlib import Path

import click

from ..schema import load
from . import compare as comparison
from . import figure, markdown, page, table

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)


@click.command(name="compare")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--threshold", type=click.FloatRange(min=0), default=0.05, show_default=True, help="Least regression.")
def compare_command(a: Path, b: Path, threshold: float) -> None:
    """Say what became faster or slower from A to B; exit status 1 where something of ours regressed.

    A change is significant where the 95% interval of the ratio of medians leaves out 1, and a regression where it is
    also worse than the threshold.
    """
    found = comparison.compare(load(a), load(b), threshold)
    comparison.render(found, table.terminal())
    if found.regressions:
        raise click.exceptions.Exit(1)


@click.command(name="report")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--markdown", "markdown_path", type=OUTPUT, help="Write one table there: our best at each problem.")
@click.option("--html", "html_path", type=OUTPUT, help="Write one page there.")
@click.option("--figure", "figure_path", type=OUTPUT, help="Draw the speed beside the best peer there, as SVG.")
def report_command(
    files: tuple[Path, ...], markdown_path: Path | None, html_path: Path | None, figure_path: Path | None
) -> None:
    """Show result files in the terminal, or write them as Markdown, a page or a figure.

    The page and the figure need matplotlib: pip install '.[bench]'.
    """
    loaded = [load(path) for path in files]
    if html_path:
        html_path.write_text(page.render(loaded), encoding="utf-8")
    if figure_path:
        figure_path.write_text(figure.svg(loaded), encoding="utf-8")
    if markdown_path:
        markdown_path.write_text(markdown.render(files, loaded, markdown_path.parent), encoding="utf-8")
    written = [path for path in (markdown_path, html_path, figure_path) if path]
    for path in written:
        click.echo(f"wrote {path}")
    if not written:
        for file in loaded:
            table.render(file, table.terminal())
