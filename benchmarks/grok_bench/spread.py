"""The 95% interval of a median or of a ratio of medians, and the ratios of a subject to its peers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import ceil, exp, floor, hypot, inf, log
from statistics import median

from .schema import ResultFile, Score


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """The order statistics that bound the median with 95% confidence, by the binomial count of samples below it."""
    ordered, n = sorted(samples), len(samples)
    reach = 0.98 * n**0.5  # 1.96 standard deviations of sqrt(n) / 2
    return ordered[max(0, floor(n / 2 - reach))], ordered[min(n - 1, ceil(n / 2 + reach))]


def significant(value: float) -> float:
    """`value` rounded to 4 significant digits."""
    return float(f"{value:.4g}")


def ratio(a: Score, b: Score) -> tuple[float, float | None, float | None]:
    """a / b of two timed scores, with its 95% interval: of the rounds, or of the medians' intervals as logarithms."""
    assert a.seconds and b.seconds  # noqa: PT018 - both are timed
    if len(a.samples) == len(b.samples) > 0:
        ratios = [x / y for x, y in zip(a.samples, b.samples, strict=True)]
        return median(ratios), *interval(ratios)
    found = a.seconds / b.seconds
    if not (a.low and a.high and b.low and b.high):
        return found, None, None
    below = hypot(log(a.seconds / a.low), log(b.high / b.seconds))
    above = hypot(log(a.high / a.seconds), log(b.seconds / b.low))
    return found, found * exp(-below), found * exp(above)


def raced(scores: Sequence[Score]) -> tuple[list[Score], str | None]:
    """The scores with each one's speed beside the best peer's, and the name of that peer, if one was timed."""
    timed = [s for s in scores if s.status == "ok" and s.seconds]
    best = min((s for s in timed if not s.ours), key=lambda s: s.seconds or inf, default=None)
    made = []
    for s in scores:
        found = ratio(best, s) if best and s in timed else (None, None, None)
        middle, low, high = (None if x is None else significant(x) for x in found)
        made.append(replace(s, speedup=middle, speedup_low=low, speedup_high=high))
    return made, best.contestant if best else None


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
