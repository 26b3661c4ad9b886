"""The serving metrics, from the times of tokens, with vLLM's names and definitions.

TTFT is the time from a request's arrival to its first token, E2E to its last; ITL are the gaps between neighbouring
tokens of a request, over all requests; TPOT is one number a request, (E2E − TTFT) / (tokens − 1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from grok_bench.schema import Percentiles
from grok_bench.spread import interval


@dataclass(slots=True)
class Record:
    """One request's times, in seconds after the start of the run."""

    arrival: float
    input_tokens: int
    times: list[float] = field(default_factory=list)  # of its tokens
    finished: bool = False
    error: str | None = None
    counted: int | None = None  # by a server, whose chunks may hold several tokens; then `times` are the chunks'

    @property
    def output_tokens(self) -> int:
        return len(self.times) if self.counted is None else self.counted

    @property
    def ttft(self) -> float | None:
        return self.times[0] - self.arrival if self.times else None

    @property
    def e2e(self) -> float | None:
        return self.times[-1] - self.arrival if self.finished and self.times else None

    @property
    def itl(self) -> list[float]:
        return [b - a for a, b in pairwise(self.times)]

    @property
    def tpot(self) -> float | None:
        """Time per output token; None with fewer than two tokens."""
        if not self.finished or self.output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)


def percentiles(values: Iterable[float | None]) -> Percentiles | None:
    """Of the values that are not None, interpolated linearly, with the 95% interval of the median; None without any."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    p50, p90, p99 = (float(p) for p in np.percentile(found, (50, 90, 99)))
    low, high = interval(found)
    return Percentiles(mean=math.fsum(found) / len(found), p50=p50, p90=p90, p99=p99, low=low, high=high)


def latencies(records: Sequence[Record]) -> dict[str, Percentiles | None]:
    """The four metrics over finished requests."""
    done = [record for record in records if record.finished]
    return {
        "ttft": percentiles(r.ttft for r in done),
        "itl": percentiles(gap for r in done for gap in r.itl),
        "tpot": percentiles(r.tpot for r in done),
        "e2e": percentiles(r.e2e for r in done),
    }


def parse_slo(texts: Iterable[str]) -> dict[str, float]:
    """Parse NAME:MILLISECONDS, separated by spaces or commas, into {"ttft_ms": 500.0}. ValueError with the text."""
    slo: dict[str, float] = {}
    for text in " ".join(texts).replace(",", " ").split():
        found = re.fullmatch(r"(ttft|tpot|e2el):(\d+(?:\.\d+)?)", text)
        if found is None or f"{found[1]}_ms" in slo:
            raise ValueError(
                f"--goodput {text!r}: expected NAME:MILLISECONDS, as in ttft:500, with ttft, tpot and e2el once each"
            )
        slo[f"{found[1]}_ms"] = float(found[2])
    return slo


def good(records: Iterable[Record], slo: Mapping[str, float]) -> int:
    """The number of finished requests within every limit; a single token has no TPOT, and is within any."""
    limits = [slo.get(name, math.inf) / 1e3 for name in ("ttft_ms", "tpot_ms", "e2el_ms")]
    times = [(r.ttft, r.tpot or 0.0, r.e2e) for r in records if r.finished]
    return sum(all(t is not None and t <= limit for t, limit in zip(ts, limits, strict=True)) for ts in times)
