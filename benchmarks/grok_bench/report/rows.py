"""A result file as rows of text, which the terminal, Markdown and the page all show."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import exp, hypot, inf, log
from statistics import geometric_mean, median
from typing import Any

from ..schema import EngineResult, KernelResult, ResultFile, Score
from ..spread import interval as spread
from .units import amount, count, digits, duration, interval

BAD = ("wrong", "failed", "timeout")
SUSPECT = 1.1  # share of the roofline above which a time cannot be true, or a ceiling is not


@dataclass(frozen=True)
class Row:
    """A contestant or a run: one cell a column, or none and a note that says why."""

    name: str
    ours: bool
    status: str
    cells: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Block:
    """A table with its title."""

    title: str
    sizes: str
    columns: tuple[str, ...]
    rows: list[Row]


def blocks(file: ResultFile) -> list[Block]:
    """One for each problem or run."""
    return [kernel_block(r, *flop_unit(file)) for r in file.kernels] + list(map(run_block, file.runs))


def flop_unit(file: ResultFile) -> tuple[float, str]:
    """TFLOP/s for chips that reach ten of them, else GFLOP/s."""
    peak = max((c.rate for c in file.ceilings.values() if c.unit != "B/s"), default=0.0)
    return (1e12, "TFLOP/s") if peak >= 1e13 else (1e9, "GFLOP/s")


def parameters(values: Mapping[str, Any]) -> str:
    """`tokens 16, routing even, dummy`: flags by name, None and False left out."""
    shown = [(k.replace("_", " "), v) for k, v in values.items() if v is not None and v is not False]
    return ", ".join(k if v is True else f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown)


def title(file: ResultFile) -> str:
    return f"{file.kind.capitalize()} on {file.environment.chip}, {file.created[:10]}"


def environment(file: ResultFile) -> list[tuple[str, str]]:
    """(what, text) of all that the numbers depend on."""
    e = file.environment
    clock = f"{e.clock_mhz:,.0f} MHz" if e.clock_mhz else None
    cores = "" if "core" in e.chip else count(e.cores, "core")
    versions = [("torch", e.torch), ("triton", e.triton), ("Python", e.python), ("driver", e.driver)]
    found = [
        ("chip", ", ".join(filter(None, (e.chip, cores, count(e.threads, "thread"), e.isa and f"isa {e.isa}", clock)))),
        ("software", ", ".join([f"{n} {v}" for n, v in versions if v] + [v for v in (e.compiler, e.os) if v])),
        ("commit", f"{e.commit}{' with changes' if e.dirty else ''}" if e.commit else ""),
        ("measured", file.created[:10] + (f", by `{file.command}`" if file.command else "")),
        ("ceilings", ", ".join(f"{name} {amount(c.rate, c.unit)}" for name, c in file.ceilings.items())),
        ("warning", "; ".join(file.warnings)),
        ("interrupted", "this run was interrupted, and is not complete" if file.interrupted else ""),
    ]
    return [(name, text) for name, text in found if text]


def best_of_ours(result: KernelResult) -> Score | None:
    """The subject's fastest that is no suspect, if there is one."""
    timed = [s for s in result.scores if s.ours and s.status == "ok" and s.seconds]
    return min(timed, key=lambda s: (suspect(s), s.seconds or 0.0), default=None)


def suspect(score: Score) -> bool:
    return (score.roofline or 0.0) > SUSPECT


def with_subject(file: ResultFile, patterns: Sequence[str]) -> ResultFile:
    """The file with the contestants that match as its subject. ValueError where none does.

    Ratios are taken anew, of the samples where the file has them, else of the medians.
    """
    if not patterns or not file.kernels:
        return file
    names = dict.fromkeys(s.contestant for r in file.kernels for s in r.scores)
    if not any(_any(name, patterns) for name in names):
        raise ValueError(f"no contestant matches --subject {' '.join(patterns)}: there are {'; '.join(names)}")
    return replace(file, results=[_retold(r, patterns) for r in file.kernels])


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _retold(r: KernelResult, patterns: Sequence[str]) -> KernelResult:
    scores = [replace(s, ours=_any(s.contestant, patterns)) for s in r.scores]
    peers = [s for s in scores if not s.ours and s.status == "ok" and s.seconds]
    best = min(peers, key=lambda s: s.seconds or 0.0, default=None)
    for i, s in enumerate(scores):
        low = high = middle = None
        if best and best.seconds and s.status == "ok" and s.seconds:
            middle, low, high = ratio(best, s)
        scores[i] = replace(s, speedup=middle, speedup_low=low, speedup_high=high)
    return replace(r, scores=scores, best_peer=best.contestant if best else None)


def ratio(a: Any, b: Any) -> tuple[float, float | None, float | None]:
    """a / b of two timed scores, with its 95% interval: of the rounds, or of the medians' intervals as logarithms."""
    if len(a.samples) == len(b.samples) > 0:
        ratios = [x / y for x, y in zip(a.samples, b.samples, strict=True)]
        return median(ratios), *spread(ratios)
    found = a.seconds / b.seconds
    if not (a.low and a.high and b.low and b.high):
        return found, None, None
    below = hypot(log(a.seconds / a.low), log(b.high / b.seconds))
    above = hypot(log(a.high / a.seconds), log(b.seconds / b.low))
    return found, found * exp(-below), found * exp(above)


def headline(file: ResultFile) -> list[tuple[str, str]]:
    """(what, value) of the few numbers that sum up a file."""
    if file.kind == "engine":
        runs = file.runs
        rates = [r.output_tokens_per_second for r in runs if r.output_tokens_per_second]
        return [
            ("runs", str(len(runs))),
            ("most output tokens a second", digits(max(rates)) if rates else "–"),
            ("requests failed", f"{sum(r.failed for r in runs)} of {sum(r.failed + r.completed for r in runs)}"),
        ]
    best = [s for s in map(best_of_ours, file.kernels) if s]
    raced = [s.speedup for s in best if s.speedup and not suspect(s)]
    sure = [(s.speedup_low or 0.0, s.speedup_high or inf) for s in best if s.speedup and not suspect(s)]
    won, lost = sum(low > 1 for low, _ in sure), sum(high < 1 for _, high in sure)
    shares = [s.roofline for s in best if s.roofline is not None]
    ours = [s for r in file.kernels for s in r.scores if s.ours]
    bad, noisy = sum(s.status in BAD for s in ours), sum(s.status == "noisy" for s in ours)
    doubtful = sum(map(suspect, ours))
    return [
        ("problems", str(len(file.kernels))),
        ("faster than the best peer", f"{won} of {len(raced)}, slower {lost}, undecided {len(raced) - won - lost}"),
        ("geometric mean, × best peer", f"{digits(geometric_mean(raced))}×" if raced else "–"),
        ("median share of the roofline", f"{median(shares):.0%}" if shares else "–"),
        *(("wrong, failed or timed out", str(bad)),) * bool(bad),
        *(("too noisy for a time", str(noisy)),) * bool(noisy),
        *((f"suspect, above {SUSPECT:.0%} of the roofline", str(doubtful)),) * bool(doubtful),
    ]


def as_csv(files: Sequence[ResultFile]) -> str:
    """A line for each contestant at each problem, with a result's own numbers: seconds, bytes, ratios."""
    members = ("contestant", "ours", "status", "error", "seconds", "low", "high", "roofline", "speedup", "speedup_low",
               "speedup_high", "message")  # fmt: skip
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow(("chip", "created", "problem", "operations", "bytes", *members, "suspect"))
    for file in files:
        for r in file.kernels:
            head = (file.environment.chip, file.created, r.problem, r.operations)
            for s in r.scores:
                out.writerow((*head, s.bytes or r.bytes, *(getattr(s, m) for m in members), suspect(s)))
    return text.getvalue()


def missing(file: ResultFile) -> list[tuple[str, str]]:
    """(contestants, why and how to get them), each reason once."""
    reasons: dict[str, dict[str, None]] = {}
    for score in (s for r in file.kernels for s in r.scores if s.status == "missing"):
        reasons.setdefault(score.message or "no reason given", {})[score.contestant] = None
    return [("; ".join(names), why) for why, names in reasons.items()]


def kernel_block(r: KernelResult, scale: float, unit: str) -> Block:
    rounds = count(r.rounds, "round") + (f" kept, {r.thrown_away} thrown away" if r.thrown_away else "")
    work = f"{amount(r.operations, 'FLOP')} in {r.arithmetic}, {amount(r.bytes, 'B')}"
    floor = f"floor {duration(r.floor_seconds)}" if r.floor_seconds else ""
    columns = ("time", "95%", "GB/s", unit, "of roofline", "× best peer", "error")
    sizes = "; ".join(filter(None, (parameters(r.parameters), work, floor, rounds)))
    sizes += "".join(f"\nwarning: {text}" for text in r.warnings)
    return Block(r.problem, sizes, columns, [_score(r, s, scale) for s in r.scores])


def _score(r: KernelResult, s: Score, scale: float) -> Row:
    error = "" if s.error is None else f"{s.error:.1e}"
    if s.status == "ok" and s.seconds is not None:
        share = "" if s.roofline is None else f"{s.roofline:.0%}{' SUSPECT' if suspect(s) else ''}"
        speedup = "" if s.speedup is None else f"{s.speedup:.2f}"
        rates = digits((s.bytes or r.bytes) / s.seconds / 1e9), digits(r.operations / s.seconds / scale)
        cells = (duration(s.seconds), interval(s.seconds, s.low, s.high), *rates, share, speedup, error)
        return Row(s.contestant, s.ours, s.status, cells)
    tolerance = r.tolerance if s.tolerance is None else s.tolerance
    off = f"error {error or '?'}" + ("" if tolerance is None else f" where {tolerance:.1e} is allowed")
    because = f": {s.message}" if s.message else ""
    notes = {
        "ok": "no quiet round, so no time",
        "wrong": f"WRONG{because if s.message and s.error is None else f': {off}{because}'}",
        "failed": f"FAILED{because}",
        "timeout": f"TIMED OUT{because}",
        "missing": "missing, see below",
        "noisy": f"noisy, so no time{because}",
    }
    return Row(s.contestant, s.ours, s.status, note=notes[s.status])


def run_block(r: EngineResult) -> Block:
    """The latencies of a run in milliseconds, under its rates."""
    failed = f", {r.failed} FAILED" if r.failed else ""
    sizes = [
        parameters(r.parameters),
        f"{count(r.completed, 'request')} completed{failed}",
        f"{r.input_tokens:,} tokens in, {r.output_tokens:,} out, in {duration(r.duration_seconds)}",
        f"{digits(r.requests_per_second)} requests/s, {digits(r.output_tokens_per_second)} output tokens/s, "
        f"{digits(r.total_tokens_per_second)} tokens/s",
    ]
    if r.load_seconds is not None and r.peak_memory_bytes is not None:
        sizes.append(f"loaded in {duration(r.load_seconds)}, peak memory {amount(r.peak_memory_bytes, 'B')}")
    if r.goodput_per_second is not None and r.slo is not None:
        limits = ", ".join(f"{name.removesuffix('_ms')} ≤ {limit:g} ms" for name, limit in r.slo.items())
        sizes.append(f"goodput {digits(r.goodput_per_second)} requests/s with {limits}")
    rows = []
    for key, m in r.metrics.items():
        values = (m.mean, m.p50, m.p90, m.p99) if m else ()
        rows.append(Row(key.upper(), False, "ok", tuple(f"{v * 1e3:,.2f}" for v in values) or ("–",) * 4))
    return Block(f"{r.protocol} {r.model}", "\n".join(["", *sizes]), ("mean", "p50", "p90", "p99 ms"), rows)
