"""`grok-engine bench compare` and `grok-engine bench report`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from ..schema import load

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _console() -> Console:
    """Of the terminal's width; 120 columns into a file."""
    return Console(highlight=False, width=None if Console().is_terminal else 120)


@click.command(name="compare")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option(
    "--threshold", type=click.FloatRange(min=0), default=0.05, show_default=True,
    help="How much worse counts as a regression, where it is significant: 0.05 is 5%.",
)  # fmt: skip
@click.option("--all", "everything", is_flag=True, help="Show what did not change too.")
def compare_command(a: Path, b: Path, threshold: float, everything: bool) -> None:
    """Say what became faster or slower from A to B; exit status 1 where something of ours regressed.

    A change is significant where 1 is outside of the 95% interval of the ratio of medians.
    """
    from . import compare_view
    from .compare import compare

    found = compare(load(a), load(b), threshold)
    compare_view.render(found, _console(), everything)
    if found.regressions:
        raise click.exceptions.Exit(1)


@click.command(name="report")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option(
    "--markdown", "markdown_path", type=click.Path(dir_okay=False, path_type=Path), help="Write Markdown there."
)
@click.option("--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), help="Write one page there.")
@click.option("--figures", "folder", type=click.Path(file_okay=False, path_type=Path), help="Draw SVG and PNG there.")
def report_command(
    files: tuple[Path, ...], markdown_path: Path | None, html_path: Path | None, folder: Path | None
) -> None:
    """Show result files: in the terminal, or as Markdown, as a page, as figures.

    Runs of an engine on the same machine are shown together, whatever files they are in.

    The page and the figures need matplotlib: pip install 'grok-engine[bench]'.
    """
    from . import figures, markdown, page, table
    from .merge import merged

    named = merged([(path.stem, load(path)) for path in files])
    if not (markdown_path or html_path or folder):
        for _, file in named:
            table.render(file, _console())
    if html_path:
        html_path.write_text(page.render(named), encoding="utf-8")
    if folder:
        figures.write(named, folder)
    if markdown_path:
        markdown_path.write_text("\n".join(markdown.render(file) for _, file in named), encoding="utf-8")
    for written in filter(None, (markdown_path, html_path, folder)):
        click.echo(f"wrote {written}")
