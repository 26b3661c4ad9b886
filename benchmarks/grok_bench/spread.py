"""The 95% interval of a median, and the digits of it that a clock can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor


def interval(samples: Sequence[float]) -> tuple[float, float]:
    """The order statistics that bound the median with 95% confidence, by the binomial count of samples below it."""
    ordered, n = sorted(samples), len(samples)
    reach = 0.98 * n**0.5  # 1.96 standard deviations of sqrt(n) / 2
    return ordered[max(0, floor(n / 2 - reach))], ordered[min(n - 1, ceil(n / 2 + reach))]


def significant(value: float) -> float:
    """`value` rounded to 4 significant digits."""
    return float(f"{value:.4g}")
