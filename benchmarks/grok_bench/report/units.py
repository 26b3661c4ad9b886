"""Numbers as text: three significant digits and a unit."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10

TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
AMOUNTS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def digits(value: float) -> str:
    """`value` with three significant digits and no exponent: 0.0123, 1.30, 340, 12,345."""
    rounded = float(f"{value:.2e}")  # 9.996 has three digits as 10.0
    return f"{value:,.{max(0, 2 - floor(log10(abs(rounded))))}f}" if value else "0"


def _unit(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    return next((u for u in units if abs(value) >= 0.9995 * u[0]), units[-1])


def duration(seconds: float) -> str:
    scale, unit = _unit(seconds, TIMES)
    return f"{digits(seconds / scale)} {unit}"


def interval(seconds: float, low: float | None, high: float | None) -> str:
    """[low, high] in the unit that `duration(seconds)` has; empty where there is no interval."""
    scale, _ = _unit(seconds, TIMES)
    return "" if low is None or high is None else f"[{digits(low / scale)}, {digits(high / scale)}]"


def amount(value: float, unit: str) -> str:
    """340 MB, 1.20 GFLOP, 45.0 GB/s."""
    scale, prefix = _unit(value, AMOUNTS)
    return f"{digits(value / scale)} {prefix}{unit}"
