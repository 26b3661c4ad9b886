"""Whether something else has the machine: load, involuntary switches, and ceilings far below the best ever seen."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..schema import Ceiling, Environment

LOAD, SWITCHES, LOW = 0.5, 100.0, 0.7  # running processes a core; switches a second; share of the best ceiling


def load(cores: int) -> list[str]:
    """A warning if others were running in the last minute. Asked before anything is measured."""
    one = os.getloadavg()[0]
    return [f"the load average is {one:.1f} on {cores} cores: others are running"] if one > LOAD * cores else []


class Switches:
    """Counts how often this process lost its core to another."""

    def __init__(self) -> None:
        self._began, self._before = time.perf_counter(), _switches()

    def warning(self) -> list[str]:
        rate = (_switches() - self._before) / max(time.perf_counter() - self._began, 1e-9)
        return [f"{rate:,.0f} involuntary context switches a second: others had the cores"] if rate > SWITCHES else []


def _switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def file() -> Path:
    """Where the best ceilings of a machine are kept from run to run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "grok-bench", "ceilings.json")


def below(found: Mapping[str, Ceiling], e: Environment) -> list[str]:
    """Warnings of ceilings far below the best kept of this chip, threads and versions; a better one is kept."""
    known: dict[str, dict[str, float]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(file().read_text(encoding="utf-8"))
    best = known.setdefault(f"{e.chip}, {e.threads} threads, torch {e.torch}", {})
    low = [
        f"the {name} ceiling is {c.rate:.3g} {c.unit}, {c.rate / best[name]:.0%} of the best that was seen here"
        for name, c in found.items()
        if c.rate < LOW * best.get(name, 0.0)
    ]
    best |= {name: max(c.rate, best.get(name, 0.0)) for name, c in found.items()}
    with suppress(OSError):  # a home that may not be written
        file().parent.mkdir(parents=True, exist_ok=True)
        partial = file().with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known, indent=1), encoding="utf-8")
        partial.replace(file())
    return low
