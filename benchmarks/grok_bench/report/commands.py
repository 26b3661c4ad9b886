"""`grok-engine bench compare` and `grok-engine bench report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ..schema import load
from . import compare as comparison
from . import figure, markdown, page, rows, table

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)
SLOWER, BROKEN = 1, 3  # exit statuses; 2 is bad input
SUBJECT = click.option("--subject", multiple=True, metavar="PATTERN", help="Contestants measured against the rest.")


@click.command(name="compare")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--threshold", type=click.FloatRange(min=0), default=0.05, show_default=True, help="Least regression.")
@SUBJECT
def compare_command(a: Path, b: Path, threshold: float, subject: tuple[str, ...]) -> None:
    """Say what became faster or slower from A to B.

    Exit status 1 where the subject is significantly slower, by more than the threshold: the 95% interval of the ratio
    leaves out 1. Exit status 3 where nothing is, but something of the subject was right and is now wrong or fails.
    """
    found = comparison.compare(load(a), load(b), threshold, subject)
    comparison.render(found, table.terminal())
    if status := SLOWER if found.of("regression") else BROKEN if found.of("broken") else 0:
        raise click.exceptions.Exit(status)


@click.command(name="report")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--markdown", "markdown_path", type=OUTPUT, help="Write one table there: the subject's best.")
@click.option("--html", "html_path", type=OUTPUT, help="Write one page there.")
@click.option("--figure", "figure_path", type=OUTPUT, help="Draw the speed beside the best peer there, as SVG.")
@click.option("--csv", "csv_path", type=OUTPUT, help="Write a line for each contestant at each problem there.")
@SUBJECT
def report_command(
    files: tuple[Path, ...],
    markdown_path: Path | None,
    html_path: Path | None,
    figure_path: Path | None,
    csv_path: Path | None,
    subject: tuple[str, ...],
) -> None:
    """Show result files in the terminal, or write them as Markdown, a page, a figure or a table."""
    loaded = [rows.with_subject(load(path), subject) for path in files]
    made: dict[Path | None, Callable[[], str]] = {
        markdown_path: lambda: markdown.render(files, loaded, (markdown_path or files[0]).parent),
        html_path: lambda: page.render(loaded),
        figure_path: lambda: figure.svg(loaded),
        csv_path: lambda: rows.as_csv(loaded),
    }
    for path, make in made.items():
        if path:
            path.write_text(make(), encoding="utf-8")
            click.echo(f"wrote {path}")
    if not any(made):
        for file in loaded:
            table.render(file, table.terminal())
