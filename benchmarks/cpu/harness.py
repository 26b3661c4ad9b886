"""Contestants at one problem, in turns with a probe of the machine, and what comes of the times.

A round is one call of every contestant, in an order that moves on, between two probes. A round whose probes differ by
more than NOISE is thrown away, and so is one whose probes are under BUSY of the usual: something else had the cores.
Of the others the medians of ratios within a round are given, since what else the machine does changes from second to
second. A contestant's result is compared with a product in fp32 before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from math import ceil, floor
from statistics import median
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .machine import Machine

NOISE, BUSY = 1.15, 0.6
NO_PARAMETERS = ("name", "op", "cache_bytes", "contestants")  # of a problem's fields
FEWEST, PATIENCE = 5, 5  # quiet rounds that a result takes, and so many times the seconds to wait for them


@dataclass(kw_only=True)
class Contestant:
    """One way to compute a problem. Where `missing` says why it cannot run here, and how to get it, there is no call."""

    name: str
    call: Callable[[int], Tensor] | None = None  # of the call's number, by which it picks copies and routing
    expected: Callable[[], Tensor] | None = None  # for call 0
    tolerance: float = 0.0  # of |got - expected| / |expected|, over all elements
    bytes: float = 0.0  # that it reads
    ours: bool = False
    missing: str = ""


@dataclass(kw_only=True)
class Setup:
    """A problem with its data. `operations` and `bytes` are what it needs, whoever computes it."""

    operations: float
    bytes: float
    arithmetic: str  # whose ceiling holds where the bytes are few: fp32, bf16 or int8
    contestants: Sequence[Contestant]


T = TypeVar("T")


@dataclass(frozen=True)
class Way(Generic[T]):
    """One implementation with its weights packed, several times where a cache could hold one copy: of many problems."""

    name: str
    copies: list[T]
    weight_bytes: int  # of one value
    tolerance: float
    missing: str = ""
    is_ours: bool = False

    @classmethod
    def ours(cls, tolerance: float, made: list[T]) -> Way[T]:
        return cls("grok_kernels", made, 1, tolerance, is_ours=True)

    def contestant(self, call: Callable[[int], Tensor], expected: Callable[[], Tensor], size: float) -> Contestant:
        if self.missing:
            return Contestant(name=self.name, missing=self.missing)
        return Contestant(
            name=self.name, call=call, expected=expected, tolerance=self.tolerance, bytes=size, ours=self.is_ours
        )


def copies(make: Callable[[], T], size: int, cache_bytes: int) -> list[T]:
    """So many, of `size` bytes each, that calls that take them in turns find nothing in a cache."""
    return [make() for _ in range(max(1, -(-4 * cache_bytes // max(size, 1))))]


class Problem(Protocol):
    """What the registry holds: cheap to make, with the data made by `build`."""

    @property
    def name(self) -> str: ...

    @property
    def op(self) -> str:
        """Of `grok_kernels`."""
        ...

    def small(self) -> Problem:
        """The same at a size that takes no time, for tests of the benchmark itself."""
        ...

    def build(self) -> Setup: ...


PROBLEMS: dict[str, Problem] = {}


def register(*problems: Problem) -> None:
    for problem in problems:
        if problem.name in PROBLEMS:
            raise ValueError(f"problem {problem.name!r} is registered twice")
        PROBLEMS[problem.name] = problem


def select(patterns: Sequence[str]) -> list[Problem]:
    """The problems that match any of the patterns, in the order of the registry; ValueError for a pattern without."""
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in PROBLEMS):
            raise ValueError(f"no problem matches {pattern!r}: --list prints their names")
    return [p for name, p in PROBLEMS.items() if not patterns or any(fnmatch(name, pattern) for pattern in patterns)]


@dataclass
class Score:
    """One contestant's result. Without `best_seconds` it was not timed: it is missing, failed, or wrong."""

    name: str
    ours: bool
    tolerance: float = 0.0
    error: float | None = None
    wrong: bool = False
    failed: str = ""  # what it raised
    missing: str = ""
    best_seconds: float | None = None  # of all rounds, quiet or not
    samples: list[float] = field(default_factory=list)  # the quiet rounds' seconds
    seconds: float | None = None  # this and what follows: medians of the quiet rounds, where they were enough
    interval: tuple[float, float] | None = None  # of 95%
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    share: float | None = None  # of the problem's floor
    times_best_peer: float | None = None  # above 1: faster than it


@dataclass
class Result:
    problem: str
    op: str
    parameters: dict[str, Any]
    operations: float
    bytes: float
    arithmetic: str
    ceiling: str
    ceiling_rate: float | None = None  # bytes or operations a second, median of the quiet rounds if they were enough
    ceiling_usual: float = 0.0  # of all probes in this process: far above, and something else used the machine
    rounds: int = 0
    thrown_away: int = 0
    best_peer: str = ""
    scores: list[Score] = field(default_factory=list)


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """Of the median, 95%: the order statistics that a binomial count of samples below it falls between."""
    ordered, n = sorted(samples), len(samples)
    reach = 0.98 * n**0.5  # 1.96 standard deviations, each √n / 2
    return ordered[max(0, floor(n / 2 - reach))], ordered[min(n - 1, ceil(n / 2 + reach))]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|; infinite where a NaN or an inf is not expected, or the shape is another."""
    if got.shape != expected.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def check(contestant: Contestant) -> Score:
    score = Score(contestant.name, contestant.ours, contestant.tolerance, missing=contestant.missing)
    if contestant.call is None or contestant.expected is None:
        return score
    try:
        got = contestant.call(0)
    except Exception as error:  # whatever one contestant raises, the others run
        score.failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return score
    score.error = relative_error(got, contestant.expected())
    score.wrong = not score.error <= contestant.tolerance
    return score


def _round(calls: Sequence[Callable[[int], Tensor]], i: int) -> list[float]:
    """The seconds of each call, the i-th of them first."""
    taken = [0.0] * len(calls)
    for j in range(len(calls)):
        which = (i + j) % len(calls)
        start = time.perf_counter()
        calls[which](i + 1)
        taken[which] = time.perf_counter() - start
    return taken


@torch.inference_mode()
def run(problem: Problem, machine: Machine, seconds: float = 4.0, most: int = 200, pick: bool = True) -> Result:
    """Checks, then times a problem's contestants, for about so many seconds and at most so many rounds.

    Without `pick` no round is thrown away.
    """
    setup = problem.build()
    ceiling, work = machine.binding(setup.operations, setup.bytes, setup.arithmetic)
    parameters = {name: value for name, value in vars(problem).items() if name not in NO_PARAMETERS}
    result = Result(problem.name, problem.op, parameters, setup.operations, setup.bytes, setup.arithmetic, ceiling.name)
    result.scores = [check(c) for c in setup.contestants]
    timed = [
        (c, s) for c, s in zip(setup.contestants, result.scores, strict=True) if c.call and not (s.wrong or s.failed)
    ]
    calls = [c.call for c, _ in timed if c.call]
    times: list[list[float]] = []
    rates: list[float] = []
    began, before = time.perf_counter(), ceiling.rate()
    while calls and len(times) + result.thrown_away < most:
        spent = time.perf_counter() - began
        if spent > seconds * (1 if len(times) >= FEWEST else PATIENCE):
            break
        taken = _round(calls, len(times) + result.thrown_away)
        for (_, score), t in zip(timed, taken, strict=True):
            score.best_seconds = t if score.best_seconds is None else min(t, score.best_seconds)
        after = ceiling.rate()
        low, high = sorted((before, after))
        if pick and (high > NOISE * low or low < BUSY * ceiling.usual):
            result.thrown_away += 1
        else:
            times.append(taken)
            rates.append((before + after) / 2)
        before = after
    result.rounds, result.ceiling_usual = len(times), ceiling.usual
    if len(times) < (FEWEST if pick else 1):
        return result
    result.ceiling_rate = median(rates)
    columns = [list(column) for column in zip(*times, strict=True)]
    peers = {j: median(columns[j]) for j, (c, _) in enumerate(timed) if not c.ours}
    best = min(peers, key=lambda j: peers[j]) if peers else None
    result.best_peer = "" if best is None else timed[best][0].name
    for j, (contestant, score) in enumerate(timed):
        score.samples = columns[j]
        score.seconds = median(columns[j])
        score.interval = interval(columns[j])
        score.gb_per_s = contestant.bytes / score.seconds / 1e9
        score.gflop_per_s = setup.operations / score.seconds / 1e9
        score.share = median(work / rate / t for rate, t in zip(rates, columns[j], strict=True))
        if best is not None:
            score.times_best_peer = median(b / t for b, t in zip(columns[best], columns[j], strict=True))
    return result
