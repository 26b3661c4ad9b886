"""A result as a table, and a run as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .harness import Result
from .machine import Machine

COLUMNS = ("time", "GB/s", "GFLOP/s", "of ceiling", "× best peer", "rel. error")


def _rate(name: str, rate: float) -> str:
    return f"{name} {rate / 1e9:.1f} GB/s" if name == "read" else f"{name} {rate / 1e9:.0f} GFLOP/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def header(environment: dict[str, Any], machine: Machine) -> str:
    e = environment
    found = {kind: f"{_rate(kind, machine.rates[kind])} ({e['instructions'][kind]})" for kind in e["instructions"]}
    return "\n".join(
        (
            f"{e['cpu']}; {e['cores']} cores, {e['threads']} thread(s), isa {e['isa']}",
            f"torch {e['torch']}, {e['compiler']}, Python {e['python']}, commit {e['commit']}",
            f"at the start: {_rate('read', machine.rates['read'])}, {', '.join(found.values())}",
        )
    )


def table(result: Result) -> Table:
    rounds = f"{result.rounds} rounds" + (f", {result.thrown_away} not quiet" if result.thrown_away else "")
    rate = "" if result.ceiling_rate is None else f"{_rate(result.ceiling, result.ceiling_rate)}, "
    title = f"{result.problem}: {result.operations / 1e9:.3g} GFLOP, {result.bytes / 1e6:.3g} MB; "
    title += f"{rate}best {_rate(result.ceiling, result.ceiling_best)}; {rounds}"
    found = Table(title=title, title_justify="left", title_style="bold", width=118, box=None, pad_edge=False)
    found.add_column("", ratio=1)
    for column in COLUMNS:
        found.add_column(column, justify="right", no_wrap=True)
    for s in result.scores:
        error = "" if s.error is None else f"{s.error:.1e}"
        if s.missing:
            found.add_row(f"{s.name}: missing")
        elif s.failed:
            found.add_row(f"{s.name}: FAILED, {escape(s.failed)}")
        elif s.wrong:
            found.add_row(f"{s.name}: WRONG, not timed", *[""] * (len(COLUMNS) - 1), error)
        elif s.seconds is None or s.gb_per_s is None or s.gflop_per_s is None or s.share is None:
            best = "" if s.best_seconds is None else f"best {_time(s.best_seconds)}"
            found.add_row(s.name, best, *[""] * (len(COLUMNS) - 2), error)
        else:
            times = "" if s.times_best_peer is None else f"{s.times_best_peer:.2f}"
            found.add_row(
                f"[bold]{s.name}[/bold]" if s.ours else s.name,
                _time(s.seconds), f"{s.gb_per_s:.1f}", f"{s.gflop_per_s:.1f}", f"{s.share:.0%}", times, error,
            )  # fmt: skip
    return found


def show(console: Console, result: Result) -> None:
    console.print()
    console.print(table(result), highlight=False)


def missing(results: Sequence[Result]) -> str:
    """Why contestants were missing, and how to get them: each reason once."""
    reasons: dict[str, set[str]] = {}
    for score in (score for result in results for score in result.scores if score.missing):
        reasons.setdefault(score.missing, set()).add(score.name)
    return "\n".join(f"missing ({'; '.join(sorted(names))}): {why}" for why, names in reasons.items())


def as_json(environment: dict[str, Any], machine: Machine, results: Sequence[Result]) -> dict[str, Any]:
    return {
        "environment": environment,
        "ceilings_at_the_start": machine.rates,
        "problems": [asdict(result) for result in results],
    }
