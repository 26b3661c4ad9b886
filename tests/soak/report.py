"""The counts of a soak as one table, and whether its memory is flat."""

from __future__ import annotations

import ctypes
import gc
import os
from collections import Counter
from itertools import zip_longest

import numpy as np

GROWTH = 24.0  # MiB over a run: what may be left by fragmentation


def resident() -> float:
    """MiB of this process, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(samples: list[float]) -> float:
    """MiB that a straight line through `samples` rises from the first third, the warm-up, to the end."""
    kept = samples[len(samples) // 3 :]
    return float(np.polyfit(range(len(kept)), kept, 1)[0]) * (len(kept) - 1) if len(kept) >= 5 else 0.0


def table(counts: Counter[str]) -> str:
    """A column for each prefix before a colon, and one for the rest."""
    columns: dict[str, list[tuple[str, int]]] = {}
    for name in sorted(counts):
        column, _, label = name.rpartition(": ")
        columns.setdefault(column, []).append((label, counts[name]))
    cells = [[title.upper() or "OTHER", *(f"{label:<18}{number:>9,}" for label, number in rows)]
             for title, rows in columns.items()]  # fmt: skip
    lines = zip_longest(*cells, fillvalue="")
    return "\n".join("   ".join(f"{cell:<27}" for cell in line).rstrip() for line in lines)
