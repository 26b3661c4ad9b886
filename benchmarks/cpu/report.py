"""A result as a table, and a run as a result file of the suite."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grok_bench.schema import Ceiling, Environment, KernelResult, ResultFile, Score, Status

from . import harness
from .machine import Machine

COLUMNS = ("time", "GB/s", "GFLOP/s", "of ceiling", "× best peer", "rel. error")


def _rate(name: str, rate: float) -> str:
    return f"{name} {rate / 1e9:.1f} GB/s" if name == "read" else f"{name} {rate / 1e9:.0f} GFLOP/s"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def header(about: Environment, machine: Machine) -> str:
    found = {kind: f"{_rate(kind, machine.rates[kind])} ({name})" for kind, name in machine.instructions.items()}
    return "\n".join(
        (
            f"{about.chip}, {about.threads} thread(s), isa {about.isa}",
            f"torch {about.torch}, {about.compiler}, Python {about.python}, commit {about.commit}"
            f"{' with changes' if about.dirty else ''}",
            f"at the start: {_rate('read', machine.rates['read'])}, {', '.join(found.values())}",
        )
    )


def table(result: harness.Result) -> Table:
    rounds = f"{result.rounds} rounds" + (f", {result.thrown_away} not quiet" if result.thrown_away else "")
    rate = "" if result.ceiling_rate is None else f"{_rate(result.ceiling, result.ceiling_rate)}, "
    title = f"{result.problem}: {result.operations / 1e9:.3g} GFLOP, {result.bytes / 1e6:.3g} MB; "
    title += f"{rate}usually {_rate(result.ceiling, result.ceiling_usual)}; {rounds}"
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


def show(console: Console, result: harness.Result) -> None:
    console.print()
    console.print(table(result), highlight=False)


def missing(results: Sequence[harness.Result]) -> str:
    """Why contestants were missing, and how to get them: each reason once."""
    reasons: dict[str, set[str]] = {}
    for score in (score for result in results for score in result.scores if score.missing):
        reasons.setdefault(score.missing, set()).add(score.name)
    return "\n".join(f"missing ({'; '.join(sorted(names))}): {why}" for why, names in reasons.items())


def _score(s: harness.Score) -> Score:
    status: Status = (
        "missing" if s.missing else "failed" if s.failed else "wrong" if s.wrong else "ok" if s.seconds else "timeout"
    )
    low, high = s.interval or (None, None)
    return Score(
        contestant=s.name,
        ours=s.ours,
        status=status,
        message=s.missing or s.failed or ("too few quiet rounds" if status == "timeout" else ""),
        error=s.error if s.error is not None and isfinite(s.error) else None,
        tolerance=s.tolerance,
        seconds=s.seconds,
        low=low,
        high=high,
        samples=[float(f"{x:.4g}") for x in s.samples],  # what a clock tells apart
        bytes_per_second=None if s.gb_per_s is None else s.gb_per_s * 1e9,
        operations_per_second=None if s.gflop_per_s is None else s.gflop_per_s * 1e9,
        share_of_roofline=s.share,
        times_best_peer=s.times_best_peer,
    )


def _result(r: harness.Result) -> KernelResult:
    work = r.bytes if r.ceiling == "read" else r.operations
    return KernelResult(
        problem=r.problem,
        op=r.op,
        family="grok",
        parameters=r.parameters,
        operations=r.operations,
        bytes=r.bytes,
        arithmetic=r.arithmetic,
        floor_seconds=work / (r.ceiling_rate or r.ceiling_usual),
        rounds=r.rounds,
        thrown_away=r.thrown_away,
        best_peer=r.best_peer or None,
        scores=[_score(s) for s in r.scores],
    )


def result_file(
    command: str, about: Environment, machine: Machine, results: Sequence[harness.Result], interrupted: bool
) -> ResultFile:
    return ResultFile(
        kind="kernels",
        command=command,
        environment=about,
        ceilings={
            name: Ceiling(unit="B/s" if name == "read" else "FLOP/s", rate=ceiling.usual)
            for name, ceiling in machine.ceilings.items()
        },
        results=[_result(r) for r in results],
        interrupted=interrupted,
    )
