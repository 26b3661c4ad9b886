"""Two result files of the same kind: what became faster or slower, and whether that is more than noise.

The measure is the ratio of medians, B over A, with its 95% interval. A change is significant where the interval leaves
out 1, and a regression where it is also worse than the threshold. Only the subject can regress: peers that moved tell
of another machine or other versions. What is too noisy for a time in either file has not changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..schema import EngineResult, ResultFile
from .rows import BAD, parameters, ratio, with_subject
from .units import count, digits, duration

FEWEST = 5  # rounds or requests on either side, for an interval
STYLES = {"regression": "bold red", "broken": "bold red", "slower": "red", "faster": "green", "fixed": "green"}
WORDS = {"unsure": "no interval", "same": "no difference", "noisy": "too noisy", "untimed": "not timed in both"}
Key = tuple[str, str]  # the problem and the contestant, or the run and the metric


class CompareError(ValueError):
    """Files of which no comparison means anything."""


@dataclass(frozen=True)
class Measure:
    """One number that both files may have, with its 95% interval where there were enough samples."""

    seconds: float | None  # or a rate, of which more is better
    low: float | None = None
    high: float | None = None
    ours: bool = True
    status: str = "ok"
    more_is_better: bool = False

    @property
    def samples(self) -> tuple[float, ...]:
        """None: the rounds of one file are not those of the other."""
        return ()


@dataclass(frozen=True)
class Change:
    """`verdict`: a key of STYLES or WORDS. `ratio`, with its interval: B over A."""

    key: Key
    a: Measure
    b: Measure
    verdict: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    warnings: list[str]

    def of(self, verdict: str) -> list[Change]:
        return [c for c in self.changes if c.verdict == verdict]


def compare(a: ResultFile, b: ResultFile, threshold: float = 0.05, subject: Sequence[str] = ()) -> Comparison:
    """CompareError for files of different kinds or devices, or with nothing in common.

    `subject`: patterns of the contestants that can regress; without, those that were the subject in both files.
    """
    a, b = with_subject(a, subject), with_subject(b, subject)
    if a.kind != b.kind:
        raise CompareError(f"A is of kind {a.kind!r} and B of kind {b.kind!r}: nothing in them can be compared")
    if a.environment.device != b.environment.device:
        raise CompareError(f"A was measured on {a.environment.device!r}, B on {b.environment.device!r}")
    of_a, of_b = dict(_measures(a)), dict(_measures(b))
    sizes = {r.problem: (r.operations, r.bytes, r.parameters) for r in a.kernels}
    others = [r.problem for r in b.kernels if sizes.get(r.problem) not in (None, (r.operations, r.bytes, r.parameters))]
    changes = [_change(key, of_a[key], of_b[key], threshold) for key in of_a if key in of_b and key[0] not in others]
    if not changes:
        raise CompareError(f"A and B have no {'problem' if a.kind == 'kernels' else 'run'} in common")
    warnings = _warnings(a, b) + [f"{problem} is another problem in B, and not compared" for problem in others]
    for side, mine, other in (("A", of_a, of_b), ("B", of_b, of_a)):
        if only := ["/".join(key) for key in mine if key not in other]:
            warnings.append(f"only in {side}: {'; '.join(only)}")
    moved = [c.ratio for c in changes if c.ratio and not c.a.ours]
    if len(moved) >= 3 and abs(median(moved) - 1) >= 0.05:
        warnings.append(f"the peers' times in B are {median(moved):.2f} of those in A: the machine may have changed")
    return Comparison(changes, warnings)


def _change(key: Key, a: Measure, b: Measure, threshold: float) -> Change:
    ours = a.ours and b.ours
    if a.status != b.status or not a.seconds or not b.seconds:
        verdict = "same" if a.status == b.status == "ok" else "untimed"  # a status may be all there is
        if ours and b.status in BAD and a.status not in BAD:
            verdict = "broken"
        elif a.status in BAD and b.status == "ok":
            verdict = "fixed"
        elif "noisy" in (a.status, b.status):
            verdict = "noisy"
        return Change(key, a, b, verdict)
    value, low, high = ratio(b, a)
    if low is None or high is None:
        return Change(key, a, b, "unsure", value)
    worse = 1 / value if a.more_is_better else value
    if low <= 1 <= high:
        verdict = "same"
    elif worse < 1:
        verdict = "faster"
    else:
        verdict = "regression" if ours and worse > 1 + threshold else "slower"
    return Change(key, a, b, verdict, value, low, high)


def _measures(file: ResultFile) -> Iterator[tuple[Key, Measure]]:
    for r in file.kernels:
        for s in r.scores:
            low, high = (s.low, s.high) if r.rounds >= FEWEST else (None, None)
            yield (r.problem, s.contestant), Measure(s.seconds, low, high, s.ours, s.status)
    for run in file.runs:
        yield from _run_measures(run)


def _run_measures(run: EngineResult) -> Iterator[tuple[Key, Measure]]:
    name = f"{run.protocol} {run.model} {parameters(run.parameters)}"
    yield (name, "requests failed"), Measure(None, status="failed" if run.failed else "ok")
    for metric in ("ttft", "e2e"):
        if m := run.metrics.get(metric):
            low, high = (m.low, m.high) if run.completed >= FEWEST else (None, None)
            yield (name, metric), Measure(m.p50, low, high)
    for rate in ("requests_per_second", "output_tokens_per_second"):  # one of each: there is no interval
        yield (name, rate.replace("_", " ")), Measure(getattr(run, rate), more_is_better=True)


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


def render(found: Comparison, console: Console) -> None:
    """Print what changed, the worst first, and count what did not."""
    for warning in found.warnings:
        console.print(Text("warning: ", style="yellow").append(warning, style="default"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan")
    for column in ("", " "):
        table.add_column(column, overflow="fold")
    for column in ("A", "B", "B / A", "95%", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for verdict, style in STYLES.items():
        for c in sorted((c for c in found.changes if c.verdict == verdict), key=lambda c: -(c.ratio or 0.0)):
            ratio = "" if c.ratio is None else f"{c.ratio:.3f}"
            spread = "" if c.low is None or c.high is None else f"[{c.low:.3f}, {c.high:.3f}]"
            table.add_row(*map(Text, (*c.key, _value(c.a), _value(c.b), ratio, spread)), Text(verdict, style))
    if table.row_count:
        console.print(table)
    counts = {v: sum(c.verdict == v for c in found.changes) for v in (*STYLES, *WORDS)}
    console.print(Text(", ".join(f"{n} {WORDS.get(v, v)}" for v, n in counts.items() if n)))
    slower, broken = len(found.of("regression")), len(found.of("broken"))
    text = ", ".join([count(slower, "regression")] * bool(slower) + [f"{broken} broken"] * bool(broken))
    console.print(Text(text, style="bold red") if text else Text("no regression", style="green"))


def _value(measure: Measure) -> str:
    if measure.seconds is None:
        return measure.status
    return digits(measure.seconds) if measure.more_is_better else duration(measure.seconds)
