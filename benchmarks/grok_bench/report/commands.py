"""`grok-engine bench compare` and `grok-engine bench report`."""

from __future__ import annotations

from pathlib import Path

import click

from ..schema import load
from ..spread import with_subject
from . import compare as comparison
from . import markdown, page, rows, table

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
@click.option("--markdown", type=OUTPUT, help="Write one table there: the subject's best.")
@click.option("--html", type=OUTPUT, help="Write one page there.")
@click.option("--csv", type=OUTPUT, help="Write a line for each contestant at each problem there.")
@SUBJECT
def report_command(files: tuple[Path, ...], subject: tuple[str, ...], **targets: Path | None) -> None:
    """Show result files in the terminal, or write them as Markdown, a page or a table of values."""
    loaded = [with_subject(load(path), subject) for path in files]
    for name, path in targets.items():
        if path is not None:
            made = {"html": page.render, "csv": rows.as_csv}.get(name)
            text = made(loaded) if made else markdown.render(files, loaded, path.parent)
            path.write_text(text, encoding="utf-8")
            click.echo(f"wrote {path}")
    if not any(targets.values()):
        for file in loaded:
            table.render(file, table.terminal())
