"""The counts of a soak as one table, and whether its memory is flat."""

from __future__ import annotations

import ctypes
import gc
import os
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

FACES = ("engine", "llm", "async")
LIMITS = {"MiB": 12.0, "objects": 1000.0}  # growth over a run: what fragmentation and caches may take
M_ARENA_MAX = -8  # of malloc.h


def one_arena() -> None:
    """Have malloc use one arena for all threads: each keeps memory of its own, which would count as growth."""
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def resident() -> dict[str, float]:
    """MiB of this process, after what is free was given back, and objects that the garbage collector knows."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return {"MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "objects": len(gc.get_objects())}


def growth(samples: list[dict[str, float]]) -> dict[str, float]:
    """How far a straight line through `samples` rises from the first third, the warm-up, to the end."""
    kept = samples[len(samples) // 3 :]
    if len(kept) < 5:
        return dict.fromkeys(LIMITS, 0.0)
    at = range(len(kept))
    return {name: float(np.polyfit(at, [sample[name] for sample in kept], 1)[0]) * (len(kept) - 1) for name in LIMITS}


@dataclass
class Tally:
    """What a soak has seen."""

    ended: Counter[tuple[str, str]] = field(default_factory=Counter)  # requests by face or kind, and how they ended
    events: Counter[str] = field(default_factory=Counter)

    def table(self) -> str:
        ways = sorted({way for _, way in self.ended})
        rows = sorted({row for row, _ in self.ended}, key=lambda row: (row not in FACES, row))
        first, width = max(map(len, rows), default=0), max(map(len, ways), default=0) + 2
        lines = ["".join([f"{'requests':<{first}}", *(f"{title:>{width}}" for title in (*ways, "in all"))])]
        for row in rows:
            numbers = [self.ended[row, way] for way in ways]
            lines.append("".join([f"{row:<{first}}", *(f"{number:>{width},}" for number in (*numbers, sum(numbers)))]))
        return "\n".join([*lines, "", *(f"{number:>9,}  {name}" for name, number in sorted(self.events.items()))])
