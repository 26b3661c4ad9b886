"""Runs of one engine that lie in several files, as one: a rate of requests a file, say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..schema import ResultFile
from .rows import engine_results

Named = tuple[str, ResultFile]


def merged(named: Sequence[Named]) -> list[Named]:
    """The files of engines with the same environment joined into the first of them; all others as they are."""
    found: list[Named] = []
    for name, file in named:
        at = next((i for i, (_, other) in enumerate(found) if _same(other, file)), None)
        if at is None:
            found.append((name, file))
            continue
        first = found[at][1]
        joined = replace(
            first,
            command=first.command if file.command == first.command else f"{first.command}; {file.command}",
            created=max(first.created, file.created),
            interrupted=first.interrupted or file.interrupted,
            ceilings=first.ceilings | file.ceilings,
            results=[*engine_results(first), *engine_results(file)],
        )
        found[at] = (found[at][0], joined)
    return found


def _same(a: ResultFile, b: ResultFile) -> bool:
    """Whether both are of an engine on one machine; its clock is another at every moment."""
    here, there = (replace(f.environment, clock_mhz=None) for f in (a, b))
    return a.kind == b.kind == "engine" and here == there
