"""Result files as Markdown: one in full, or all of them in one table of our best contestant at each problem."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..schema import ResultFile
from .rows import Block, Row, best_of_ours, blocks, environment, flop_unit, headline, kernel_block, missing, parameters
from .rows import title as title_of
from .units import duration, interval

SUMMARY = """# Results

Made of the files in `{folder}/` by `grok-engine bench report`; do not edit. A row is our fastest contestant at one
problem: its median time with the 95% interval, the rates of the problem's bytes and operations, the share of what the
machine's own ceilings allow (*of roofline*), and the best peer's time over ours in the same rounds (*× peer*: above 1,
ours is faster). Every contestant of every problem: `grok-engine bench report {folder}/NAME.json`.
"""
COLUMNS = ("machine", "problem", "time", "95%", "GB/s", "FLOP/s", "of roofline", "× peer", "best peer")


def render(file: ResultFile) -> str:
    """The whole file."""
    parts = [f"# {_escape(title_of(file))}", _list(f"{name}: **{_escape(value)}**" for name, value in headline(file))]
    for block in blocks(file):
        parts += [
            f"## {_escape(block.title)}",
            _escape("; ".join(block.sizes.split("\n")).removeprefix("; ")),
            _block(block),
        ]
    if missing(file):
        parts += ["## Missing", _list(f"{_escape(names)}: {_escape(why)}" for names, why in missing(file))]
    parts += ["## Environment", _list(f"{name}: {_escape(text)}" for name, text in environment(file))]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(named: Sequence[tuple[str, ResultFile]], folder: str, picture: str | None = None) -> str:
    """RESULTS.md of the files (by name) in `folder`, the newest first: a line for each file, then one table.

    `picture`: a figure to show above the table, by its path from RESULTS.md.
    """
    ordered = sorted(named, key=lambda pair: pair[1].created, reverse=True)
    keys = [chr(ord("A") + i) for i in range(len(ordered))]
    lines = []
    for key, (name, file) in zip(keys, ordered, strict=True):
        numbers = "; ".join(f"{what} {value}" for what, value in headline(file))
        lines.append(f"**{key}** [{_escape(title_of(file))}]({folder}/{name}.json): {numbers}")
    rows = [row for key, (_, file) in zip(keys, ordered, strict=True) for row in _summary_rows(key, file)]
    show = [f"![× the best peer]({picture})"] if picture else []
    return "\n\n".join([SUMMARY.format(folder=folder).rstrip(), _list(lines), *show, _table(COLUMNS, rows, 2)]) + "\n"


def _summary_rows(key: str, file: ResultFile) -> Iterator[list[str]]:
    for r in file.kernels:
        best = best_of_ours(r)
        if best is None:
            why = next(
                (row.note for row in kernel_block(r, *flop_unit(file)).rows if row.ours and row.note), "not timed"
            )
            yield [key, _escape(r.problem), _escape(why), *[""] * 6]
            continue
        scale, unit = flop_unit(file)
        (row,) = (row for row in kernel_block(r, scale, unit).rows if row.name == best.contestant)
        time, spread, size, rate, share, speedup, _ = row.cells
        rate = f"{rate} {unit[0]}"
        yield [key, *map(_escape, (r.problem, time, spread, size, rate, share, speedup, r.best_peer or ""))]
    for run in file.runs:
        eager = "eager" if run.parameters.get("enforce_eager") else ""
        shown = {k: run.parameters.get(k) for k in ("layers", "weights", "batch_size", "request_rate")}
        name = ", ".join(filter(None, (f"{run.protocol} {run.model}", parameters(shown), eager, "a token")))
        tpot = run.metrics.get("tpot")
        time, spread = (duration(tpot.p50), interval(tpot.p50, tpot.low, tpot.high)) if tpot else ("", "")
        yield [key, *map(_escape, (name, time, spread)), *[""] * 5]


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _block(block: Block) -> str:
    return _table(("", *block.columns), [_row(row) for row in block.rows], 1)


def _row(row: Row) -> list[str]:
    name = f"**{_escape(row.name)}**" if row.ours else _escape(row.name)
    return [name + (f"<br>{_escape(row.note)}" if row.note else ""), *map(_escape, row.cells)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    """The first `names` columns are text, to the left."""
    rule = ["---" if i < names else "---:" for i in range(len(columns))]
    padded = ([*row, *[""] * (len(columns) - len(row))] for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *padded))


def _escape(text: str) -> str:
    """On one line, with nothing that Markdown or HTML would read. Underscores within words mean nothing to Markdown."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[|]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def write_summary(named: Sequence[tuple[str, ResultFile]], paths: Sequence[Path], target: Path) -> None:
    """`summary` of the files at `paths`, with the picture `speedup.svg` beside them if there is one."""
    folder = paths[0].resolve().parent
    at = folder.relative_to(target.resolve().parent).as_posix()
    picture = f"{at}/speedup.svg" if (folder / "speedup.svg").is_file() else None
    target.write_text(summary(named, at, picture), encoding="utf-8")
