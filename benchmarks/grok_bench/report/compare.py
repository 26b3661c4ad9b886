"""Two result files of the same kind: what became faster or slower, and whether that is more than noise.

The measure is the ratio of medians, B over A. Its 95% interval follows from those of the medians, whose widths add in
quadrature as logarithms. A change is significant where the interval leaves out 1, and a regression where it is also
worse than the threshold. Only ours can regress: peers that moved tell of another machine or other versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, hypot, log
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..schema import EngineResult, KernelResult, ResultFile
from ..spread import interval
from .rows import BAD, parameters
from .units import count, digits, duration

FEWEST = 5  # rounds, requests or runs on either side, for an interval
STYLES = {"regression": "bold red", "broken": "bold red", "slower": "red", "faster": "green", "fixed": "green"}
WORDS = {"unsure": "no interval", "same": "no difference", "untimed": "not timed in both"}
ORDER = (*STYLES, *WORDS)


class CompareError(ValueError):
    """Files of which no comparison means anything."""


@dataclass(frozen=True)
class Measure:
    """One number that both files may have, with its 95% interval where there were enough samples."""

    value: float | None
    low: float | None = None
    high: float | None = None
    ours: bool = True
    status: str = "ok"
    more_is_better: bool = False


@dataclass(frozen=True)
class Change:
    what: str  # the problem, or the run
    who: str  # the contestant, or the metric
    a: Measure
    b: Measure
    verdict: str  # one of ORDER
    ratio: float | None = None  # B over A
    low: float | None = None
    high: float | None = None

    @property
    def worse(self) -> float:
        ratio = self.ratio or 0.0
        return 1 / ratio if ratio and self.a.more_is_better else ratio


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    warnings: list[str]
    only_a: list[str]
    only_b: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [c for c in self.changes if c.verdict in ("regression", "broken")]


def compare(a: ResultFile, b: ResultFile, threshold: float = 0.05) -> Comparison:
    """CompareError for files of different kinds or devices, or with nothing in common."""
    if a.kind != b.kind:
        raise CompareError(f"A is of kind {a.kind!r} and B of kind {b.kind!r}: nothing in them can be compared")
    if a.environment.device != b.environment.device:
        raise CompareError(f"A was measured on {a.environment.device!r}, B on {b.environment.device!r}")
    of_a, of_b = dict(_measures(a)), dict(_measures(b))
    sizes = {r.problem: _size(r) for r in a.kernels}
    redefined = [r.problem for r in b.kernels if sizes.get(r.problem, _size(r)) != _size(r)]
    both = [key for key in of_a if key in of_b and key[0] not in redefined]
    if not both:
        raise CompareError(f"A and B have no {'problem' if a.kind == 'kernels' else 'run'} in common")
    changes = [_change(*key, of_a[key], of_b[key], threshold) for key in both]
    warnings = _warnings(a, b) + [f"{p} is another problem in B, and not compared" for p in redefined] + _drift(changes)
    only_a, only_b = ([", ".join(k) for k in x if k not in y] for x, y in ((of_a, of_b), (of_b, of_a)))
    return Comparison(changes, warnings, only_a, only_b)


def _size(r: KernelResult) -> tuple[object, ...]:
    return r.operations, r.bytes, r.parameters


def _change(what: str, who: str, a: Measure, b: Measure, threshold: float) -> Change:
    if a.status != b.status or not a.value or not b.value:
        verdict = "untimed"
        if a.ours and b.status in BAD and a.status not in BAD:
            verdict = "broken"
        elif a.status in BAD and b.status == "ok":
            verdict = "fixed"
        elif a.status == b.status == "ok" and a.value is None and b.value is None:
            verdict = "same"  # a status is all there is
        return Change(what, who, a, b, verdict)
    ratio = b.value / a.value
    if not (a.low and a.high and b.low and b.high):
        return Change(what, who, a, b, "unsure", ratio)
    low = ratio * exp(-hypot(log(b.value / b.low), log(a.high / a.value)))
    high = ratio * exp(hypot(log(b.high / b.value), log(a.value / a.low)))
    found = Change(what, who, a, b, "", ratio, low, high)
    if low <= 1 <= high:
        verdict = "same"
    elif found.worse < 1:
        verdict = "faster"
    else:
        verdict = "regression" if a.ours and found.worse > 1 + threshold else "slower"
    return Change(what, who, a, b, verdict, ratio, low, high)


def _measures(file: ResultFile) -> Iterator[tuple[tuple[str, str], Measure]]:
    """By problem and contestant, or by run and metric."""
    for r in file.kernels:
        for s in r.scores:
            low, high = (s.low, s.high) if r.rounds >= FEWEST else (None, None)
            yield (r.problem, s.contestant), Measure(s.seconds, low, high, s.ours, s.status)
    runs: dict[str, list[EngineResult]] = {}
    for run in file.runs:
        runs.setdefault(f"{run.protocol} {run.model} {parameters(run.parameters)}", []).append(run)
    for name, same in runs.items():
        yield (name, "requests failed"), Measure(None, status="failed" if any(r.failed for r in same) else "ok")
        for key in ("ttft", "e2e"):
            if m := same[0].metrics.get(key):
                low, high = (m.low, m.high) if same[0].completed >= FEWEST else (None, None)
                yield (name, key), Measure(m.p50, low, high)
        for key in ("requests_per_second", "output_tokens_per_second"):
            # a run has one rate: an interval takes several runs of the same parameters
            rates = [getattr(r, key) for r in same if getattr(r, key)]
            if rates:
                low, high = interval(rates) if len(rates) >= FEWEST else (None, None)
                yield (name, key.replace("_", " ")), Measure(median(rates), low, high, more_is_better=True)


def _warnings(a: ResultFile, b: ResultFile) -> list[str]:
    found = []
    for what in ("chip", "threads", "isa", "torch", "triton", "driver", "compiler"):
        old, new = getattr(a.environment, what), getattr(b.environment, what)
        if old != new:
            found.append(f"{what}: {old or 'none'} in A, {new or 'none'} in B")
    for name in a.ceilings.keys() & b.ceilings.keys():
        ratio = b.ceilings[name].rate / a.ceilings[name].rate
        if not 0.9 < ratio < 1.1:
            found.append(f"the machine's {name} ceiling in B is {ratio:.2f} of that in A")
    return found + [f"{name} was interrupted" for name, file in (("A", a), ("B", b)) if file.interrupted]


def _drift(changes: list[Change]) -> list[str]:
    moved = [c.ratio for c in changes if c.ratio and not c.a.ours]
    if len(moved) < 3 or abs(median(moved) - 1) < 0.05:
        return []
    return [f"the peers' times in B are {median(moved):.2f} of those in A: the machine itself may have changed"]


def render(found: Comparison, console: Console, everything: bool = False) -> None:
    """Print what changed, the worst first; count what did not, or with `everything` print it, too."""
    for warning in found.warnings:
        console.print(Text("warning: ", style="yellow").append(warning, style="default"))
    changes = sorted(found.changes, key=lambda c: (ORDER.index(c.verdict), -c.worse))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan")
    for column in ("", " "):
        table.add_column(column, overflow="fold")
    for column in ("A", "B", "B / A", "95%", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for c in changes:
        if everything or c.verdict in STYLES:
            spread = "" if c.low is None or c.high is None else f"[{c.low:.3f}, {c.high:.3f}]"
            ratio = "" if c.ratio is None else f"{c.ratio:.3f}"
            words = (c.what, c.who, _value(c.a), _value(c.b), ratio, spread)
            table.add_row(*map(Text, words), Text(WORDS.get(c.verdict, c.verdict), STYLES.get(c.verdict, "")))
    if table.row_count:
        console.print(table)
    counts = {v: sum(c.verdict == v for c in changes) for v in ORDER}
    console.print(Text(", ".join(f"{n} {WORDS.get(v, v)}" for v, n in counts.items() if n)))
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            console.print(Text(f"only in {side}: {'; '.join(names)}", style="dim"))
    bad = len(found.regressions)
    console.print(Text(count(bad, "regression"), style="bold red") if bad else Text("no regression", style="green"))


def _value(measure: Measure) -> str:
    if measure.value is None:
        return measure.status
    return digits(measure.value) if measure.more_is_better else duration(measure.value)
