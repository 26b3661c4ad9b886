"""`grok_bench.calls`: checked calls of contestants, to be timed by pytest-benchmark or by anything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from . import contestant, lineup
from .device import known
from .entrant import Dropped
from .problems import Value, select

LIMIT = 60.0  # seconds of a call


@dataclass
class Call:
    """One contestant at one problem, within `with`: called, it computes with the next inputs, whose caches are cold."""

    problem: str
    who: contestant.Contestant
    device: str
    small: bool

    def __str__(self) -> str:
        return f"{self.problem} {self.who.name}"

    def __enter__(self) -> Call:
        """Build the inputs and check the result. AssertionError, with the reason, if it is wrong or fails."""
        self._entrant = lineup.enter(self.problem, self.who.name, self.device, self.small, (), LIMIT)
        self._check(again=False)
        self._calls = cycle(self._entrant.calls)
        return self

    def __call__(self) -> Any:
        with self.who.within():
            return next(self._calls)()

    def __exit__(self, kind: object, *_: object) -> None:
        """Check again, with inputs that are changed in place."""
        if kind is None:
            self._check(again=True)
        self._entrant.close()

    def _check(self, again: bool) -> None:
        try:
            self._entrant.check(again)
        except Dropped as dropped:
            raise AssertionError(f"{self}: {': '.join(dropped.args[:2])}") from None


def calls(
    *patterns: str, plugins: Sequence[str | Path] = (), contestants: Sequence[str] = (), name: str = "cpu",
    sizes: dict[str, Value] | None = None, small: bool = False,
) -> list[Call]:  # fmt: skip
    """The contestants at the problems that match, as `bench kernels` takes them: without those that cannot run here.

    `name`: the device; `sizes`: as --set has them.
    """
    lineup.load(plugins)
    kind = known(name).split(":")[0]
    return [
        Call(problem.name, c, name, small)
        for problem in (p.small() if small else p for p in select(patterns, sizes))
        for c in contestant.entrants(problem, kind, contestants, compiles=not small)
        if not c.missing()
    ]
