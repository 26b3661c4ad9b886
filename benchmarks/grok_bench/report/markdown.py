"""Result files as one table in Markdown, of our best contestant at each problem: benchmarks/RESULTS.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..schema import KernelResult, ResultFile
from .rows import best_of_ours, block, headline

ABOUT = """# Results

Made of the files in `{folder}/` by `grok-engine bench report`; do not edit. A row is our fastest contestant at one
problem. *Of roofline* is the share of what the machine's own ceilings allow, *× best peer* the best peer's time over
ours in the same rounds: above 1, ours is faster. All contestants: `grok-engine bench report {folder}/NAME.json`."""
COLUMNS = ("time", "95%", "GB/s", "FLOP/s", "of roofline", "× best peer")


def render(paths: Sequence[Path], files: Sequence[ResultFile], target: Path) -> str:
    """The text of a file in the folder `target`: a line for each file, the newest first, then one table.

    `files`: those at `paths`.
    """
    folder = paths[0].resolve().parent.relative_to(target.resolve()).as_posix()
    ordered = sorted(zip(paths, files, strict=True), key=lambda pair: pair[1].created, reverse=True)
    lines, rows = [], [_row(["machine", "problem", *COLUMNS, "best peer"]), _row(["---", "---", *["---:"] * 7])]
    for key, (path, file) in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", ordered, strict=False):
        numbers = "; ".join(f"{what} {value}" for what, value in headline(file))
        lines.append(f"- **{key}** [{path.stem}]({folder}/{path.name}): {numbers}")
        rows += [_row([key, r.problem, *_cells(r), r.best_peer or ""]) for r in file.kernels]
    return "\n\n".join([ABOUT.format(folder=folder), "\n".join(lines), "\n".join(rows)]) + "\n"


def _cells(r: KernelResult) -> list[str]:
    """A cell for each of COLUMNS, or why there is no time."""
    ours, best = {row.name: row for row in block(r).rows if row.ours}, best_of_ours(r)
    if best:
        return [ours[best.contestant].cells[name] for name in COLUMNS]
    return [next((row.note for row in ours.values()), "not measured"), *[""] * (len(COLUMNS) - 1)]


def _row(cells: Sequence[str]) -> str:
    """With nothing in a cell that Markdown or HTML would read. Underscores within words mean nothing to Markdown."""
    texts = (" ".join(cell.split()).replace("&", "&amp;").replace("<", "&lt;") for cell in cells)
    escaped = (re.sub(r"([\\`*\[|]|(?<!\w)_|_(?!\w))", r"\\\1", text) for text in texts)
    return f"| {' | '.join(escaped)} |"
