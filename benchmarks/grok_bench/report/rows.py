"""A result file as rows of text, which the terminal, Markdown and the page all show."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from math import inf
from statistics import geometric_mean, median
from typing import Any

from ..schema import EngineResult, KernelResult, ResultFile, Score
from ..spread import raced
from .units import amount, count, digits, duration, interval

BAD = ("wrong", "failed", "timeout")
COLUMNS = ("mean", "p50", "p90", "p99")  # of a run
SUSPECT = 1.1  # share of the roofline above which a time cannot be true, or a ceiling is not


@dataclass(frozen=True)
class Row:
    """A contestant or a metric of a run: a cell for each column, or none and a note that says why."""

    name: str
    ours: bool
    status: str
    cells: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Block:
    """A table of one problem or run, with its title."""

    title: str
    sizes: str
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """Those in which any row has text."""
        return list(dict.fromkeys(name for row in self.rows for name, text in row.cells.items() if text))


def block(file: ResultFile, result: KernelResult | EngineResult) -> Block:
    if isinstance(result, EngineResult):
        return _run(result)
    return _problem(result, *flop_unit(file))


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
    """The file with the contestants that match as its subject, and ratios taken anew. ValueError where none does."""
    if not patterns or not file.kernels:
        return file
    names = dict.fromkeys(s.contestant for r in file.kernels for s in r.scores)
    mine = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not mine:
        raise ValueError(f"no contestant matches --subject {' '.join(patterns)}: there are {'; '.join(names)}")
    results = []
    for r in file.kernels:
        scores, best_peer = raced([replace(s, ours=s.contestant in mine) for s in r.scores])
        results.append(replace(r, scores=scores, best_peer=best_peer))
    return replace(file, results=results)


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
    sure = [s for s in best if s.speedup and not suspect(s)]
    won, lost = sum((s.speedup_low or 0) > 1 for s in sure), sum((s.speedup_high or inf) < 1 for s in sure)
    shares = [s.roofline for s in best if s.roofline is not None]
    ours = [s for r in file.kernels for s in r.scores if s.ours]
    rare = {
        "wrong, failed or timed out": sum(s.status in BAD for s in ours),
        "too noisy for a time": sum(s.status == "noisy" for s in ours),
        f"suspect, above {SUSPECT:.0%} of the roofline": sum(map(suspect, ours)),
    }
    return [
        ("problems", str(len(file.kernels))),
        ("faster than the best peer", f"{won} of {len(sure)}, slower {lost}, undecided {len(sure) - won - lost}"),
        ("geometric mean, × best peer", f"{digits(geometric_mean(s.speedup or 0 for s in sure))}×" if sure else "–"),
        ("median share of the roofline", f"{median(shares):.0%}" if shares else "–"),
        *((what, str(number)) for what, number in rare.items() if number),
    ]


def as_csv(files: Sequence[ResultFile]) -> str:
    """A line for each contestant at each problem, with a result's own numbers: seconds, bytes, ratios."""
    members = [f.name for f in fields(Score) if f.name != "samples"]
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow(("chip", "created", "problem", "operations", *members, "suspect"))
    for file in files:
        for r in file.kernels:
            head = (file.environment.chip, file.created, r.problem, r.operations)
            for s in r.scores:
                values = asdict(replace(s, bytes=s.bytes or r.bytes))
                out.writerow((*head, *(values[member] for member in members), suspect(s)))
    return text.getvalue()


def missing(file: ResultFile) -> list[tuple[str, str]]:
    """(contestants, why and how to get them), each reason once."""
    reasons: dict[str, dict[str, None]] = {}
    for score in (s for r in file.kernels for s in r.scores if s.status == "missing"):
        reasons.setdefault(score.message or "no reason given", {})[score.contestant] = None
    return [("; ".join(names), why) for why, names in reasons.items()]


def _problem(r: KernelResult, scale: float, unit: str) -> Block:
    rounds = count(r.rounds, "round") + (f" kept, {r.thrown_away} thrown away" if r.thrown_away else "")
    work = f"{amount(r.operations, 'FLOP')} in {r.arithmetic}, {amount(r.bytes, 'B')}"
    floor = f"floor {duration(r.floor_seconds)}" if r.floor_seconds else ""
    sizes = "; ".join(filter(None, (parameters(r.parameters), work, floor, rounds)))
    sizes += "".join(f"\nwarning: {text}" for text in r.warnings)
    return Block(r.problem, sizes, [_score(r, s, scale, unit) for s in r.scores])


def _score(r: KernelResult, s: Score, scale: float, unit: str) -> Row:
    error = "" if s.error is None else f"{s.error:.1e}"
    if s.status == "ok" and s.seconds is not None:
        return Row(s.contestant, s.ours, s.status, {
            "time": duration(s.seconds),
            "95%": interval(s.seconds, s.low, s.high),
            "GB/s": digits((s.bytes or r.bytes) / s.seconds / 1e9),
            unit: digits(r.operations / s.seconds / scale),
            "of roofline": "" if s.roofline is None else f"{s.roofline:.0%}{' SUSPECT' * suspect(s)}",
            "× best peer": "" if s.speedup is None else f"{s.speedup:.2f}",
            "error": error,
        })  # fmt: skip
    tolerance = r.tolerance if s.tolerance is None else s.tolerance
    off = f": error {error or '?'}" + ("" if tolerance is None else f" where {tolerance:.1e} is allowed")
    because = f": {s.message}" if s.message else ""
    notes = {
        "ok": "no quiet round, so no time",
        "wrong": f"WRONG{'' if because and s.error is None else off}{because}",
        "failed": f"FAILED{because}",
        "timeout": f"TIMED OUT{because}",
        "missing": "missing, see below",
        "noisy": f"noisy, so no time{because}",
    }
    return Row(s.contestant, s.ours, s.status, note=notes[s.status])


def _run(r: EngineResult) -> Block:
    """The latencies of a run in milliseconds, under its rates."""
    failed = f", {r.failed} FAILED" if r.failed else ""
    rates = [
        f"{digits(rate)} {of}/s" for rate, of in (
            (r.requests_per_second, "requests"), (r.output_tokens_per_second, "output tokens"),
            (r.total_tokens_per_second, "tokens"),
        )
    ]  # fmt: skip
    if r.goodput_per_second is not None and r.slo is not None:
        limits = ", ".join(f"{name.removesuffix('_ms')} ≤ {limit:g} ms" for name, limit in r.slo.items())
        rates.append(f"goodput {digits(r.goodput_per_second)} requests/s with {limits}")
    sizes = [
        "",
        parameters(r.parameters),
        f"{count(r.completed, 'request')} completed{failed}",
        f"{r.input_tokens:,} tokens in, {r.output_tokens:,} out, in {duration(r.duration_seconds)}",
        ", ".join(rates),
    ]
    if r.load_seconds is not None and r.peak_memory_bytes is not None:
        sizes.append(f"loaded in {duration(r.load_seconds)}, peak memory {amount(r.peak_memory_bytes, 'B')}")
    rows = [
        Row(key.upper(), False, "ok", {f"{c} ms": f"{getattr(m, c) * 1e3:,.2f}" if m else "–" for c in COLUMNS})
        for key, m in r.metrics.items()
    ]
    return Block(f"{r.protocol} {r.model}", "\n".join(sizes), rows)
