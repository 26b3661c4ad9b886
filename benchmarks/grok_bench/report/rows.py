"""A result file as rows of text: what the terminal, the Markdown and the page all show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean, median
from typing import Any, cast

from ..schema import EngineResult, KernelResult, Percentiles, ResultFile, Score
from .units import amount, count, digits, duration, interval, pair, times


@dataclass(frozen=True)
class Cell:
    text: str = ""
    value: float | None = None  # to sort by


@dataclass(frozen=True)
class Row:
    name: str
    ours: bool
    status: str
    cells: tuple[Cell, ...] = ()  # one a column, or none
    note: str = ""  # in place of the cells


@dataclass(frozen=True)
class Block:
    title: str
    sizes: str
    columns: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)


def kernel_results(file: ResultFile) -> list[KernelResult]:
    return cast("list[KernelResult]", file.results) if file.kind == "kernels" else []


def engine_results(file: ResultFile) -> list[EngineResult]:
    return cast("list[EngineResult]", file.results) if file.kind == "engine" else []


def blocks(file: ResultFile) -> list[Block]:
    """One a problem, or one for all runs of an engine."""
    if file.kind == "engine":
        return [_engine_block(engine_results(file))] if file.results else []
    return [_kernel_block(result, *flop_unit(file)) for result in kernel_results(file)]


def flop_unit(file: ResultFile) -> tuple[float, str]:
    """TFLOP/s for chips that reach ten of them, else GFLOP/s."""
    peak = max((c.rate for c in file.ceilings.values() if c.unit != "B/s"), default=0.0)
    return (1e12, "TFLOP/s") if peak >= 1e13 else (1e9, "GFLOP/s")


def memory_ceiling(file: ResultFile) -> str | None:
    """The name of the ceiling in bytes: reading, where that was measured, or copying."""
    return next((name for name in ("read", "copy") if name in file.ceilings), None)


def parameters(values: Mapping[str, Any], skip: Sequence[str] = ()) -> str:
    """`tokens 16, routing even, dummy`: flags by name, what is None or off left out."""
    shown = [(k.replace("_", " "), v) for k, v in values.items() if k not in skip and v is not None and v is not False]
    return ", ".join(name if value is True else f"{name} {_plain(value)}" for name, value in shown)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def environment(file: ResultFile) -> list[tuple[str, str]]:
    e = file.environment
    changed = " with changes" if e.dirty else ""
    speed = f"{e.clock_mhz:,.0f} MHz" if e.clock_mhz else None
    cores = "" if "core" in e.chip else count(e.cores, "core")
    isa = None if e.isa is None else f"isa {e.isa}"
    versions = [("torch", e.torch), ("triton", e.triton), ("Python", e.python), ("driver", e.driver)]
    found = [
        ("chip", ", ".join(filter(None, (e.chip, cores, count(e.threads, "thread"), isa, speed)))),
        ("software", ", ".join([f"{n} {v}" for n, v in versions if v] + [v for v in (e.compiler, e.os) if v])),
        ("commit", f"{e.commit}{changed}" if e.commit else ""),
        ("measured", f"{date(file)}, by `{file.command}`" if file.command else date(file)),
        ("ceilings", ", ".join(f"{name} {amount(c.rate, c.unit)}" for name, c in file.ceilings.items())),
    ]
    return [(name, text) for name, text in found if text]


def date(file: ResultFile) -> str:
    return file.created[:10]


def caption(file: ResultFile) -> str:
    """Of a figure: where, when and of what."""
    e = file.environment
    threads = f", {e.threads} threads" if e.device == "cpu" and e.threads > 1 else ""
    return " · ".join(filter(None, (f"{e.chip}{threads}", date(file), f"commit {e.commit}" if e.commit else "")))


def interrupted(file: ResultFile) -> str:
    return "This run was interrupted: what follows is not all of it." if file.interrupted else ""


def best_of_ours(result: KernelResult) -> Score | None:
    timed = [s for s in result.scores if s.ours and s.status == "ok" and s.seconds]
    return min(timed, key=lambda s: s.seconds or 0.0, default=None)


def best_peer(result: KernelResult) -> Score | None:
    return next((s for s in result.scores if s.contestant == result.best_peer and s.seconds), None)


def headline(file: ResultFile) -> list[tuple[str, str]]:
    """The few numbers that say how it went: (what, value)."""
    if file.kind == "engine":
        runs = engine_results(file)
        rates = [r.output_tokens_per_second for r in runs if r.output_tokens_per_second]
        first = [t.p50 for t in (r.metrics.get("ttft") for r in runs) if t]
        return [
            ("runs", str(len(runs))),
            ("most output tokens a second", digits(max(rates)) if rates else "–"),
            ("shortest median time to first token", duration(min(first)) if first else "–"),
            ("requests failed", f"{sum(r.failed for r in runs)} of {sum(r.failed + r.completed for r in runs)}"),
        ]
    results = kernel_results(file)
    best = [s for s in map(best_of_ours, results) if s]
    raced = [s.times_best_peer for s in best if s.times_best_peer]
    shares = [s.share_of_roofline for s in best if s.share_of_roofline is not None]
    bad = sum(s.ours and s.status in ("wrong", "failed", "timeout") for r in results for s in r.scores)
    return [
        ("problems", str(len(results))),
        ("faster than the best peer", f"{sum(r > 1 for r in raced)} of {len(raced)}"),
        ("geometric mean, × best peer", times(geometric_mean(raced)) if raced else "–"),
        ("median share of the roofline", f"{median(shares):.0%}" if shares else "–"),
        ("of ours wrong, failed or timed out", str(bad)),
    ]


def missing(file: ResultFile) -> list[tuple[str, str]]:
    """(contestants, why and how to get them), each reason once."""
    reasons: dict[str, dict[str, None]] = {}
    for score in (s for r in kernel_results(file) for s in r.scores if s.status == "missing"):
        reasons.setdefault(score.message or "no reason given", {})[score.contestant] = None
    return [("; ".join(names), why) for why, names in reasons.items()]


def _kernel_block(result: KernelResult, scale: float, unit: str) -> Block:
    rounds = count(result.rounds, "round")
    if result.thrown_away:
        rounds += f" kept, {result.thrown_away} thrown away"
    sizes = (
        parameters(result.parameters),
        f"{amount(result.operations, 'FLOP')} in {result.arithmetic}, {amount(result.bytes, 'B')}",
        f"floor {duration(result.floor_seconds)}" if result.floor_seconds else "",
        rounds,
    )
    columns = ("time", "95%", "GB/s", unit, "of roofline", "× best peer", "error")
    return Block(result.problem, "; ".join(filter(None, sizes)), columns, [_score(s, scale) for s in result.scores])


def _score(s: Score, scale: float) -> Row:
    row = Row(s.contestant, s.ours, s.status)
    if s.status == "ok" and s.seconds is not None:
        return Row(
            s.contestant, s.ours, s.status,
            (
                Cell(duration(s.seconds), s.seconds),
                Cell(interval(s.seconds, s.low, s.high)),
                _rate(s.bytes_per_second, 1e9),
                _rate(s.operations_per_second, scale),
                Cell() if s.share_of_roofline is None else Cell(f"{s.share_of_roofline:.0%}", s.share_of_roofline),
                Cell() if s.times_best_peer is None else Cell(f"{s.times_best_peer:.2f}", s.times_best_peer),
                Cell() if s.error is None else Cell(f"{s.error:.1e}", s.error),
            ),
        )  # fmt: skip
    because = f": {s.message}" if s.message else ""
    error = f"{s.error:.1e}" if s.error is not None else "?"
    tolerance = f" where {s.tolerance:.1e} is allowed" if s.tolerance is not None else ""
    notes = {
        "ok": "no quiet round, so no time",
        "wrong": f"WRONG, not timed: error {error}{tolerance}{because}",
        "failed": f"FAILED{because}",
        "timeout": f"TIMED OUT{because}",
        "missing": "missing, see below",
    }
    return Row(row.name, row.ours, row.status, note=notes.get(s.status, s.status + because))


def _rate(value: float | None, scale: float) -> Cell:
    return Cell() if value is None else Cell(digits(value / scale), value)


METRICS = (("ttft", "first token"), ("tpot", "per token"), ("e2e", "whole request"))


def _engine_block(results: Sequence[EngineResult]) -> Block:
    """What all runs share stands in the title, what they do not in the names of the rows."""
    everything = [{"protocol": r.protocol, "model": r.model, **r.parameters} for r in results]
    shared = {k: v for k, v in everything[0].items() if all(k in p and p[k] == v for p in everything)}
    columns = (
        "requests/s",
        "output tokens/s",
        "tokens/s",
        *(f"{n}, p50 · p99" for _, n in METRICS),
        "goodput/s",
        "peak",
    )
    title = " ".join(str(shared.pop(k)) for k in ("model", "protocol") if k in shared) or "engine"
    found = Block(title, parameters(shared), columns)
    for result, values in zip(results, everything, strict=True):
        own = {k: v for k, v in values.items() if k not in shared and k not in ("protocol", "model")}
        kind = [str(values[k]) for k in ("model", "protocol") if not all(p[k] == values[k] for p in everything)]
        name = ", ".join([*kind, *filter(None, [parameters(own)])]) or result.protocol
        note = f"{result.failed} of {result.completed + result.failed} requests FAILED" if result.failed else ""
        found.rows.append(Row(name, False, "failed" if result.failed else "ok", _run_cells(result), note))
    return found


def _run_cells(r: EngineResult) -> tuple[Cell, ...]:
    return (
        _rate(r.requests_per_second, 1),
        _rate(r.output_tokens_per_second, 1),
        _rate(r.total_tokens_per_second, 1),
        *(_pair(r.metrics.get(key)) for key, _ in METRICS),
        _rate(r.goodput_per_second, 1),
        Cell(amount(r.peak_memory_bytes, "B"), r.peak_memory_bytes),
    )


def _pair(quantiles: Percentiles | None) -> Cell:
    if not quantiles:
        return Cell()
    return Cell(pair(quantiles.p50, quantiles.p99), quantiles.p50)
