"""A result file as rows of text, which the terminal, Markdown and the page all show."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from statistics import geometric_mean, median
from typing import Any

from ..schema import EngineResult, KernelResult, ResultFile, Score
from .units import amount, digits, duration, interval

BAD = {"wrong": "WRONG", "failed": "FAILED", "timeout": "TIMED OUT"}
COLUMNS = ("mean", "p50", "p90", "p99")  # of a run
SUSPECT = 1.1  # share of the roofline above which a time cannot be true, or a ceiling is not


@dataclass(frozen=True)
class Row:
    """A contestant, or a metric of a run: a cell for each column, or none and a note that says why."""

    name: str
    ours: bool = False
    bad: bool = False
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


def parameters(values: Mapping[str, Any]) -> str:
    """`tokens 16, routing even, dummy`: flags by name, None and False left out."""
    shown = [(k.replace("_", " "), v) for k, v in values.items() if v is not None and v is not False]
    return ", ".join(k if v is True else f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown)


def environment(file: ResultFile) -> list[tuple[str, str]]:
    """(what, text) of all that the numbers depend on."""
    found = [
        ("machine", parameters(asdict(file.environment))),
        ("measured", file.created[:10] + (f", by `{file.command}`" if file.command else "")),
        ("ceilings", ", ".join(f"{name} {amount(c.rate, c.unit)}" for name, c in file.ceilings.items())),
        ("warning", "; ".join([*file.warnings, *["this run was interrupted, and is not complete"] * file.interrupted])),
    ]
    return [(name, text) for name, text in found if text]


def best_of_ours(result: KernelResult) -> Score | None:
    """The subject's fastest that is no suspect, if there is one."""
    timed = [s for s in result.scores if s.ours and s.status == "ok" and s.seconds]
    return min(timed, key=lambda s: (suspect(s), s.seconds or 0.0), default=None)


def suspect(score: Score) -> bool:
    return (score.roofline or 0.0) > SUSPECT


def headline(file: ResultFile) -> list[tuple[str, str]]:
    """(what, value) of the few numbers that sum up a file, and of contestants that were missing, each reason once."""
    if file.kind == "engine":
        tokens = [duration(m.p50) for r in file.runs if (m := r.metrics.get("tpot"))]
        failed, completed = (sum(getattr(r, what) for r in file.runs) for what in ("failed", "completed"))
        return [("a token", ", ".join(tokens) or "–"), ("requests failed", f"{failed} of {failed + completed}")]
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
    reasons: dict[str, list[str]] = {}
    for s in (s for r in file.kernels for s in r.scores if s.status == "missing"):
        reasons.setdefault(s.message or "no reason given", []).append(s.contestant)
    return [
        ("problems", str(len(file.kernels))),
        ("faster than the best peer", f"{won} of {len(sure)}, slower {lost}, undecided {len(sure) - won - lost}"),
        ("geometric mean, × best peer", f"{digits(geometric_mean(s.speedup or 0 for s in sure))}×" if sure else "–"),
        ("median share of the roofline", f"{median(shares):.0%}" if shares else "–"),
        *((what, str(number)) for what, number in rare.items() if number),
        *((f"missing {len(who)} times ({'; '.join(dict.fromkeys(who))})", why) for why, who in reasons.items()),
    ]


def as_csv(files: Sequence[ResultFile]) -> str:
    """A line for each contestant at each problem, with a result's own numbers: seconds, bytes, ratios."""
    members = [f.name for f in fields(Score) if f.name != "samples"]
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow(("chip", "created", "problem", "operations", *members, "suspect"))
    scores = [(file, r, s) for file in files for r in file.kernels for s in r.scores]
    for file, r, s in scores:
        head = (file.environment.chip, file.created, r.problem, r.operations)
        values = asdict(replace(s, bytes=s.bytes or r.bytes))
        out.writerow((*head, *(values[member] for member in members), suspect(s)))
    return text.getvalue()


def block(r: KernelResult | EngineResult) -> Block:
    if isinstance(r, EngineResult):
        return _run(r)
    sizes = [
        parameters(r.parameters),
        f"{amount(r.operations, 'FLOP')} in {r.arithmetic}, {amount(r.bytes, 'B')}",
        f"floor {duration(r.floor_seconds)}" if r.floor_seconds else "",
        f"rounds kept {r.rounds}, thrown away {r.thrown_away}",
    ]
    lines = ["; ".join(filter(None, sizes)), *(f"warning: {warning}" for warning in r.warnings)]
    if r.gpu:
        lines.append(parameters(asdict(r.gpu)))
    return Block(r.problem, "\n".join(lines), [_score(r, s) for s in r.scores if s.status != "missing"])


def _score(r: KernelResult, s: Score) -> Row:
    if s.status == "ok" and s.seconds is not None:
        return Row(s.contestant, s.ours, cells={
            "time": duration(s.seconds),
            "95%": interval(s.seconds, s.low, s.high),
            "GB/s": digits((s.bytes or r.bytes) / s.seconds / 1e9),
            "FLOP/s": amount(r.operations / s.seconds, ""),
            "of roofline": "" if s.roofline is None else f"{s.roofline:.0%}{' SUSPECT' * suspect(s)}",
            "× best peer": "" if s.speedup is None else f"{s.speedup:.2f}",
            "error": "" if s.error is None else f"{s.error:.1e}",
        })  # fmt: skip
    why = [BAD.get(s.status, "noisy, so no time"), *filter(None, [s.message])]
    return Row(s.contestant, s.ours, s.status in BAD, note=": ".join(why))


def _run(r: EngineResult) -> Block:
    """The latencies of a run in milliseconds, under its rates."""
    sizes = [
        "",
        parameters(r.parameters),
        f"requests completed {r.completed:,}{f', FAILED {r.failed:,}' if r.failed else ''}",
        f"{r.input_tokens:,} tokens in, {r.output_tokens:,} out, in {duration(r.duration_seconds)}",
        f"{digits(r.requests_per_second)} requests/s, {digits(r.output_tokens_per_second)} output tokens/s, "
        f"{digits(r.total_tokens_per_second)} tokens/s",
    ]
    if r.goodput_per_second is not None and r.slo is not None:
        sizes.append(f"goodput {digits(r.goodput_per_second)} requests/s with {parameters(r.slo)}")
    if r.load_seconds is not None and r.peak_memory_bytes is not None:
        sizes.append(f"loaded in {duration(r.load_seconds)}, peak memory {amount(r.peak_memory_bytes, 'B')}")
    rows = [
        Row(key.upper(), cells={f"{c} ms": f"{getattr(m, c) * 1e3:,.2f}" if m else "–" for c in COLUMNS})
        for key, m in r.metrics.items()
    ]
    return Block(f"{r.protocol} {r.model}", "\n".join(sizes), rows)
