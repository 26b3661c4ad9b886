"""Two result files of the same kind: what became faster or slower, and whether that is more than noise.

The measure is the ratio of medians, B over A, with its 95% interval. A change is significant where the interval leaves
out 1, and a regression where it is also worse than the threshold. Only the subject can regress: peers that moved tell
of another machine or other versions. What is too noisy for a time in either file has not changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from rich.console import Console
from rich.text import Text

from ..schema import ResultFile, Score
from ..spread import ratio, with_subject
from .rows import BAD, parameters
from .table import grid
from .units import duration

FEWEST = 5  # rounds or requests on either side, for an interval
STYLES = {"regression": "bold red", "broken": "bold red", "slower": "red", "faster": "green", "fixed": "green"}
VERSIONS = ("chip", "threads", "isa", "torch", "triton", "driver", "compiler")
Key = tuple[str, str]  # the problem and the contestant, or the run and the metric


@dataclass(frozen=True)
class Change:
    """`verdict`: a key of STYLES where something changed. `ratio`, with its interval: B over A."""

    key: Key
    a: Score
    b: Score
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
    """ValueError for files of different kinds or devices, or with nothing in common.

    `subject`: patterns of the contestants that can regress; without, those that were the subject in both files.
    """
    a, b = with_subject(a, subject), with_subject(b, subject)
    if a.environment.device != b.environment.device:
        raise ValueError(f"A was measured on {a.environment.device!r}, B on {b.environment.device!r}")
    of_a, of_b = dict(_measures(a)), dict(_measures(b))
    sizes = {r.problem: (r.operations, r.bytes, r.parameters) for r in a.kernels}
    others = [r.problem for r in b.kernels if sizes.get(r.problem) not in (None, (r.operations, r.bytes, r.parameters))]
    changes = [_change(key, of_a[key], of_b[key], threshold) for key in of_a if key in of_b and key[0] not in others]
    if not changes:
        raise ValueError(f"A (kind {a.kind!r}) and B (kind {b.kind!r}) have nothing in common")
    warnings = _warnings(a, b) + [f"{problem} is another problem in B, and not compared" for problem in others]
    for side, mine, other in (("A", of_a, of_b), ("B", of_b, of_a)):
        if only := ["/".join(key) for key in mine if key not in other]:
            warnings.append(f"only in {side}: {'; '.join(only)}")
    moved = [c.ratio for c in changes if c.ratio and not c.a.ours]
    if len(moved) >= 3 and abs(median(moved) - 1) >= 0.05:
        warnings.append(f"the peers' times in B are {median(moved):.2f} of those in A: the machine may have changed")
    return Comparison(changes, warnings)


def _change(key: Key, a: Score, b: Score, threshold: float) -> Change:
    ours, states = a.ours and b.ours, {a.status, b.status}
    if states == {"ok"} and a.seconds and b.seconds:
        value, low, high = ratio(b, a)
        if low is None or high is None:
            verdict = "no interval"
        elif low <= 1 <= high:
            verdict = "no difference"
        elif value < 1:
            verdict = "faster"
        else:
            verdict = "regression" if ours and value > 1 + threshold else "slower"
        return Change(key, a, b, verdict, value, low, high)
    if ours and b.status in BAD and a.status not in BAD:
        return Change(key, a, b, "broken")
    if a.status in BAD and b.status == "ok":
        return Change(key, a, b, "fixed")
    same = "no difference" if states == {"ok"} else "not timed in both"
    return Change(key, a, b, "too noisy" if "noisy" in states else same)


def _measures(file: ResultFile) -> Iterator[tuple[Key, Score]]:
    """What both files may have; without samples, since the rounds of one file are not those of the other."""
    for r in file.kernels:
        for s in r.scores:
            yield (r.problem, s.contestant), replace(s, samples=[], low=s.low if r.rounds >= FEWEST else None)
    for run in file.runs:
        name = f"{run.protocol} {run.model} {parameters(run.parameters)}"
        failed = Score(contestant="requests failed", ours=True, status="failed" if run.failed else "ok")
        yield (name, failed.contestant), failed
        for metric in ("ttft", "e2e"):
            if m := run.metrics.get(metric):
                low = m.low if run.completed >= FEWEST else None
                yield (name, metric), Score(contestant=metric, ours=True, seconds=m.p50, low=low, high=m.high)


def _warnings(a: ResultFile, b: ResultFile) -> list[str]:
    old, new = asdict(a.environment), asdict(b.environment)
    changed = [what for what in VERSIONS if old[what] != new[what]]
    found = [f"{what}: {old[what] or 'none'} in A, {new[what] or 'none'} in B" for what in changed]
    for name in a.ceilings.keys() & b.ceilings.keys():
        share = b.ceilings[name].rate / a.ceilings[name].rate
        if not 0.9 < share < 1.1:
            found.append(f"the machine's {name} ceiling in B is {share:.2f} of that in A")
    return found + [f"{name} was interrupted" for name, file in (("A", a), ("B", b)) if file.interrupted]


def render(found: Comparison, console: Console) -> None:
    """Print what changed, the worst first, and count what did not."""
    for warning in found.warnings:
        console.print(Text("warning: ", style="yellow").append(warning, style="default"))
    rows: list[Sequence[str | Text]] = []
    for verdict, style in STYLES.items():
        for c in sorted(found.of(verdict), key=lambda c: -(c.ratio or 0.0)):
            times = [duration(s.seconds) if s.seconds else s.status for s in (c.a, c.b)]
            spread = "" if c.low is None else f"[{c.low:.3f}, {c.high:.3f}]"
            rows.append((*c.key, *times, f"{c.ratio:.3f}" if c.ratio else "", spread, Text(verdict, style)))
    grid(("", " ", "A", "B", "B / A", "95%", ""), rows, console, names=2)
    counts = Counter(c.verdict for c in found.changes)
    console.print(Text(", ".join(f"{verdict}: {n}" for verdict, n in counts.most_common())))
