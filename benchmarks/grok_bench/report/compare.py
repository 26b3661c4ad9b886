"""Two result files of the same kind: what became faster or slower, and whether that is more than noise.

The measure is the ratio of medians, B over A, with a 95% interval by the bootstrap: both samples drawn again, with
replacement, from a fixed seed. A change is significant where the interval leaves 1 out, and a regression where it is
also worse than the threshold. Only what is ours can regress: peers that moved tell of another machine, or of other
versions, and are shown for that.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from ..schema import EngineResult, ResultFile
from .rows import engine_results, kernel_results

FEWEST = 5  # samples on either side, for an interval
DRAWS = 2000


class CompareError(ValueError):
    """Files of which no comparison means anything."""


@dataclass(frozen=True)
class Measure:
    """One number that both files may have, with the samples that it is the median of."""

    value: float | None
    samples: tuple[float, ...] = ()
    ours: bool = True
    status: str = "ok"
    more_is_better: bool = False


@dataclass(frozen=True)
class Change:
    what: str  # the problem, or the run
    who: str  # the contestant, or the metric
    a: Measure
    b: Measure
    verdict: str  # regression, slower, same, faster, unsure, broken, fixed, untimed
    ratio: float | None = None  # of B over A
    low: float | None = None
    high: float | None = None

    @property
    def ours(self) -> bool:
        return self.a.ours


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    warnings: list[str] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)

    @property
    def regressions(self) -> list[Change]:
        return [c for c in self.changes if c.verdict in ("regression", "broken")]


def compare(a: ResultFile, b: ResultFile, threshold: float = 0.05) -> Comparison:
    """CompareError for files of different kinds, devices or without anything in common."""
    if a.kind != b.kind:
        raise CompareError(f"A is of kind {a.kind!r} and B of kind {b.kind!r}: nothing in them can be compared")
    if a.environment.device != b.environment.device:
        raise CompareError(f"A was measured on {a.environment.device!r}, B on {b.environment.device!r}")
    of_a, of_b = dict(_measures(a)), dict(_measures(b))
    redefined = _redefined(a, b)
    both = [key for key in of_a if key in of_b and key[0] not in redefined]
    if not both:
        raise CompareError(f"A and B have no {'problem' if a.kind == 'kernels' else 'run'} in common")
    changes = [_change(*key, of_a[key], of_b[key], threshold) for key in both]
    names = {what for what, _ in both}
    return Comparison(
        changes,
        _warnings(a, b) + [f"{p} is another problem in B, and not compared" for p in redefined] + _drift(changes),
        only_a=list(dict.fromkeys(_name(key, names) for key in of_a if key not in of_b)),
        only_b=list(dict.fromkeys(_name(key, names) for key in of_b if key not in of_a)),
    )


def ratio_interval(
    a: tuple[float, ...], b: tuple[float, ...], seed: int = 0, draws: int = DRAWS
) -> tuple[float, float] | None:
    """95% of the bootstrap's median(b) / median(a); None where there are too few samples to say."""
    if min(len(a), len(b)) < FEWEST:
        return None
    random = np.random.default_rng(seed)
    medians = [np.median(random.choice(np.asarray(s), (draws, len(s))), axis=1) for s in (a, b)]
    low, high = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    return float(low), float(high)


def _change(what: str, who: str, a: Measure, b: Measure, threshold: float) -> Change:
    if a.status != b.status or not a.value or not b.value:
        bad = ("wrong", "failed", "timeout")
        verdict = "untimed"
        if a.ours and b.status in bad and a.status not in bad:
            verdict = "broken"
        elif a.status in bad and b.status == "ok":
            verdict = "fixed"
        elif a.status == b.status == "ok" and a.value is None and b.value is None:
            verdict = "same"  # a status is all there is
        return Change(what, who, a, b, verdict)
    ratio = b.value / a.value
    found = ratio_interval(a.samples, b.samples, zlib.crc32(f"{what}/{who}".encode()))
    if found is None:
        return Change(what, who, a, b, "unsure", ratio)
    low, high = found
    if low <= 1 <= high:
        verdict = "same"
    elif (ratio > 1) == a.more_is_better:
        verdict = "faster"
    else:
        worse = 1 / ratio if a.more_is_better else ratio
        verdict = "regression" if a.ours and worse > 1 + threshold else "slower"
    return Change(what, who, a, b, verdict, ratio, low, high)


def _measures(file: ResultFile) -> Iterator[tuple[tuple[str, str], Measure]]:
    """By problem and contestant, or by run and metric."""
    if file.kind == "kernels":
        for r in kernel_results(file):
            for s in r.scores:
                yield (r.problem, s.contestant), Measure(s.seconds, tuple(s.samples), s.ours, s.status)
        return
    runs: dict[str, list[EngineResult]] = {}
    for run in engine_results(file):
        runs.setdefault(_run_name(run), []).append(run)
    for name, same in runs.items():
        yield (name, "requests failed"), Measure(None, status="failed" if any(r.failed for r in same) else "ok")
        for key in ("ttft", "e2e"):
            waits = tuple(float(w) for w in (getattr(q, key) for r in same for q in r.requests) if w is not None)
            if waits:
                yield (name, key), Measure(median(waits), waits)
        for key in ("requests_per_second", "output_tokens_per_second"):
            # a run has one rate: a sample is a run, and it takes several of them for an interval
            rates = tuple(float(v) for v in (getattr(r, key) for r in same) if v)
            if rates:
                yield (name, key.replace("_", " ")), Measure(median(rates), rates, more_is_better=True)


def _run_name(run: EngineResult) -> str:
    shown = (f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in sorted(run.parameters.items()))
    return " ".join([run.protocol, run.model, *shown])


def _name(key: tuple[str, str], common: set[str]) -> str:
    """The problem alone where all of it is on one side."""
    return ", ".join(key) if key[0] in common else key[0]


def _redefined(a: ResultFile, b: ResultFile) -> list[str]:
    """Problems of one name whose size is not the same."""
    sizes = {r.problem: (r.operations, r.bytes, r.parameters) for r in kernel_results(a)}
    found = ((r.problem, (r.operations, r.bytes, r.parameters)) for r in kernel_results(b))
    return [problem for problem, size in found if sizes.get(problem, size) != size]


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
    found += [f"{name} was interrupted" for name, file in (("A", a), ("B", b)) if file.interrupted]
    return found


def _drift(changes: list[Change]) -> list[str]:
    moved = [c.ratio for c in changes if c.ratio and not c.ours]
    if len(moved) < 3 or abs(median(moved) - 1) < 0.05:
        return []
    return [f"the peers' times in B are {median(moved):.2f} of those in A: the machine itself may have changed"]
