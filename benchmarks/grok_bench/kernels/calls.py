"""`grok_bench.calls`: checked calls of contestants, to be timed by pytest-benchmark or by anything else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from . import cases, contestant, lineup
from .device import device, known
from .entrant import Dropped, Local
from .problems import Value, select


class Call:
    """One contestant at one problem, within `with`: called, it computes with the next inputs, whose caches are cold."""

    def __init__(self, problem: Any, who: contestant.Contestant, name: str, small: bool) -> None:
        self._problem, self._who, self._name, self._small = problem, who, name, small

    def __str__(self) -> str:
        return f"{self._problem.name} {self._who.name}"

    def __enter__(self) -> Call:
        """Build the inputs and check the result. AssertionError, with the reason, if it is wrong or fails."""
        where = device(self._name, self._small, probed=False)
        self._case = cases.build(self._problem, where.name, where.cold)
        self._entrant = Local(self._who, self._case, where, 60.0)
        self._check(again=False)
        self._calls = cycle(self._entrant.calls)
        return self

    def __call__(self) -> Any:
        with self._who.within():
            return next(self._calls)()

    def __exit__(self, kind: object, *_: object) -> None:
        """Check again, with inputs that are changed in place."""
        if kind is None:
            self._check(again=True)
        self._entrant.close()

    def _check(self, again: bool) -> None:
        allowed = self._case.tolerance if self._who.tolerance is None else self._who.tolerance
        try:
            error = self._entrant.check(again)
        except Dropped as dropped:
            raise AssertionError(f"{self}: {': '.join(dropped.args)}") from None
        if not error <= allowed:
            raise AssertionError(f"{self}: the error is {error:.1e}, at most {allowed:.1e} is allowed")


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
        Call(problem, c, name, small)
        for problem in (p.small() if small else p for p in select(patterns, sizes))
        for c in contestant.entrants(problem, kind, contestants, compiles=not small)
        if not c.missing()
    ]
