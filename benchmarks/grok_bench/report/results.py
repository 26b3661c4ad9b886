"""`python -m grok_bench.report.results FOLDER [--check]`: FOLDER/../RESULTS.md, of all result files in FOLDER."""

from __future__ import annotations

from pathlib import Path

import click

from ..schema import SchemaError, load
from . import markdown
from .rows import headline

HEAD = """# Results

Made from the files in `{0}/` by `python -m grok_bench.report.results`; not to be edited. Times are medians, with 95%
intervals. *Of roofline* is the least time that the machine's own measured ceilings allow, over the time taken.
*× best peer* is above 1 where a contestant is faster than the fastest that is not ours, in the same rounds."""


def update_results(folder: Path) -> str:
    """The text of RESULTS.md, to lie beside `folder`: every result file there, the newest first."""
    files = [(load(path), path.stem) for path in sorted(folder.glob("*.json"))]
    files.sort(key=lambda pair: pair[0].created, reverse=True)
    parts = [HEAD.format(folder.name)]
    contents = []
    for file, stem in files:
        numbers = "; ".join(f"{name} {value}" for name, value in headline(file))
        contents.append(f"- [{markdown.title(file)}]({folder.name}/{stem}.json): {numbers}")
    parts.append("\n".join(contents) or "There are none yet.")
    for file, stem in files:
        parts += [markdown.render(file, 2).rstrip("\n"), *_pictures(folder, stem)]
    return "\n\n".join(parts) + "\n"


def _pictures(folder: Path, stem: str) -> list[str]:
    """Those that `report --figures FOLDER/figures` has drawn of this file."""
    found = []
    at = f"{folder.name}/figures"
    for light in sorted((folder / "figures").glob(f"{stem}-*-light.svg")):
        dark = light.with_name(light.name.replace("-light.svg", "-dark.svg"))
        if dark.exists():
            name = light.name.removeprefix(f"{stem}-").removesuffix("-light.svg")
            found.append(
                f'<picture><source media="(prefers-color-scheme: dark)" srcset="{at}/{dark.name}">'
                f'<img alt="{name} of {stem}" src="{at}/{light.name}"></picture>'
            )
    return found


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 where RESULTS.md is not what it would be.")
def main(folder: Path, check: bool) -> None:
    """Write RESULTS.md beside FOLDER, of all result files in it."""
    path = folder.resolve().parent / "RESULTS.md"
    try:
        text = update_results(folder)
    except SchemaError as error:
        raise click.ClickException(str(error)) from None
    if not check:
        path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        raise click.ClickException(f"{path} is not what the files in {folder} say: run this without --check")


if __name__ == "__main__":
    main()
