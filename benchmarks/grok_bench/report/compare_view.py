"""A comparison in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .compare import Change, Comparison, Measure
from .units import count, digits, duration

STYLES = {"regression": "bold red", "broken": "bold red", "slower": "red", "faster": "green", "fixed": "green"}
ORDER = ("broken", "regression", "slower", "fixed", "faster", "unsure", "same", "untimed")
WORDS = {"unsure": "no interval", "same": "no difference", "untimed": "not timed in both"}
SHOWN = ORDER[:5]


def render(found: Comparison, console: Console, everything: bool = False) -> None:
    """What changed, the worst first; what did not is counted, or with `everything` shown too."""
    for warning in found.warnings:
        console.print(Text("warning: ", style="yellow").append(warning, style="default"))
    changes = sorted(found.changes, key=lambda c: (ORDER.index(c.verdict), -_worse(c)))
    shown = [c for c in changes if everything or c.verdict in SHOWN]
    if shown:
        console.print(_table(shown, _short_names(found.changes)))
    counts = [
        f"{sum(c.verdict == v for c in changes)} {WORDS.get(v, v)}"
        for v in ORDER
        if any(c.verdict == v for c in changes)
    ]
    console.print(Text(", ".join(counts)))
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            console.print(Text(f"only in {side}: {'; '.join(names)}", style="dim"))
    bad = len(found.regressions)
    console.print(Text(count(bad, "regression"), style="bold red") if bad else Text("no regression", style="green"))


def _short_names(changes: list[Change]) -> dict[str, str]:
    """Without the words that all of them share: of runs, the parameters that are the same everywhere."""
    names = {c.what: c.what.split() for c in changes}
    shared = set.intersection(*map(set, names.values())) if len(names) > 1 else set()
    return {name: " ".join(w for w in words if w not in shared) for name, words in names.items()}


def _table(changes: list[Change], names: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan")
    table.add_column("", overflow="fold")
    table.add_column("", overflow="fold")
    for column in ("A", "B", "B / A", "95%", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for c in changes:
        style = STYLES.get(c.verdict, "")
        table.add_row(
            Text(names[c.what]), Text(c.who, style="bold" if c.ours else ""), _value(c.a), _value(c.b),
            "" if c.ratio is None else f"{c.ratio:.3f}",
            "" if c.low is None or c.high is None else Text(f"[{c.low:.3f}, {c.high:.3f}]"),
            Text(WORDS.get(c.verdict, c.verdict), style=style),
        )  # fmt: skip
    return table


def _value(measure: Measure) -> str:
    if measure.value is None:
        return measure.status
    return digits(measure.value) if measure.more_is_better else duration(measure.value)


def _worse(change: Change) -> float:
    if change.ratio is None:
        return 0.0
    return 1 / change.ratio if change.a.more_is_better else change.ratio
