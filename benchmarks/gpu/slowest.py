"""Which of our kernels are the furthest from the machine's ceilings, by a file of results."""

from __future__ import annotations

from pathlib import Path

from grok_bench import schema

COUNT = 3
LEAST = 2e-5  # seconds of the floor: below, a launch is most of the time, and a profile says no more


def slowest(file: Path, count: int = COUNT) -> list[tuple[str, str]]:
    """The problems whose best backend of ours has the least share of the roofline, and that backend."""
    found: list[tuple[float, str, str]] = []
    for result in schema.load(file).results:
        assert isinstance(result, schema.KernelResult), f"{file} holds results of the engine"
        ours = [s for s in result.scores if s.ours and s.roofline is not None and "reference" not in s.contestant]
        if not ours or (result.floor_seconds or 0.0) < LEAST:
            continue
        best = max(ours, key=lambda s: s.roofline or 0.0)
        found.append((best.roofline or 0.0, result.problem, best.contestant))
    return [(problem, contestant) for _, problem, contestant in sorted(found)[:count]]
