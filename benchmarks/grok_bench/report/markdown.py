"""Result files as one table in Markdown, of our best contestant at each problem: benchmarks/RESULTS.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..schema import ResultFile
from .rows import best_of_ours, block, flop_unit, headline, parameters, title
from .units import duration, interval

ABOUT = """# Results

Made of the files in `{folder}/` by `grok-engine bench report`; do not edit. A row is our fastest contestant at one
problem: its median time with the 95% interval, the rates of the problem's bytes and operations, the share of what the
machine's own ceilings allow (*of roofline*), and the best peer's time over ours in the same rounds (*× peer*: above 1,
ours is faster). Every contestant of every problem: `grok-engine bench report {folder}/NAME.json`."""
COLUMNS = ("machine", "problem", "time", "95%", "GB/s", "FLOP/s", "of roofline", "× peer", "best peer")


def render(paths: Sequence[Path], files: Sequence[ResultFile], target: Path) -> str:
    """The text of a file in the folder `target`: a line for each file, the newest first, then one table.

    `files`: those at `paths`. The picture `speedup.svg` beside them is shown, if there is one.
    """
    folder = paths[0].resolve().parent
    at = folder.relative_to(target.resolve()).as_posix()
    ordered = sorted(zip(paths, files, strict=True), key=lambda pair: pair[1].created, reverse=True)
    lines, rows = [], []
    for key, (path, file) in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", ordered, strict=False):
        numbers = "; ".join(f"{what} {value}" for what, value in headline(file))
        lines.append(f"- **{key}** [{_escape(title(file))}]({at}/{path.name}): {numbers}")
        rows += [_line([key, *map(_escape, cells)]) for cells in _rows(file)]
    picture = [f"![× the best peer]({at}/speedup.svg)"] if (folder / "speedup.svg").is_file() else []
    head = [_line(COLUMNS), _line(["---", "---", *["---:"] * 7])]
    return "\n\n".join([ABOUT.format(folder=at), "\n".join(lines), *picture, "\n".join([*head, *rows])]) + "\n"


def _rows(file: ResultFile) -> Iterator[list[str]]:
    """The cells after the machine's."""
    _, unit = flop_unit(file)
    for r in file.kernels:
        rows, best = {row.name: row for row in block(file, r).rows}, best_of_ours(r)
        if best is None:
            yield [
                r.problem,
                next((row.note for row in rows.values() if row.ours and row.note), "not timed"),
                *[""] * 6,
            ]
            continue
        cells = rows[best.contestant].cells
        rate, (time, spread, size) = f"{cells[unit]} {unit[0]}", (cells[name] for name in ("time", "95%", "GB/s"))
        yield [r.problem, time, spread, size, rate, cells["of roofline"], cells["× best peer"], r.best_peer or ""]
    for run in file.runs:
        eager = "eager" if run.parameters.get("enforce_eager") else ""
        shown = {k: run.parameters.get(k) for k in ("layers", "weights", "batch_size", "request_rate")}
        name = ", ".join(filter(None, (f"{run.protocol} {run.model}", parameters(shown), eager, "a token")))
        tpot = run.metrics.get("tpot")
        yield [name, *((duration(tpot.p50), interval(tpot.p50, tpot.low, tpot.high)) if tpot else ("", "")), *[""] * 5]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would read. Underscores within words mean nothing to Markdown."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[|]|(?<!\w)_|_(?!\w))", r"\\\1", text)
