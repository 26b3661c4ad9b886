"""Who computes a problem: the registry of contestants, and the decorator that puts a function of anyone's into it."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from .problems import OPS, Problem

Call = Callable[[], Any]
Function = TypeVar("Function", bound=Callable[..., Any])
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to compute the problems of an op.

    `bind` takes one call's inputs and does what need not be timed, such as packing weights; what it returns is timed.
    Where that returns a function, the result is what the function gives, after the time.
    """

    name: str
    op: str
    bind: Callable[[Any], Call]
    ours: bool = False
    devices: Sequence[str] = DEVICES
    enters: Callable[[Problem], bool] = lambda problem: True  # whether it is for such a problem
    missing: Callable[[], str] = lambda: ""  # why it cannot run here, and how to get it
    instead: Callable[[Any], Any] | None = None  # of the inputs: those it can do; the truth is of those, too
    within: Callable[[], AbstractContextManager[Any]] = nullcontext  # around each call, outside of its time
    tolerance: float | None = None  # where not the problem's
    weight_bytes: float | None = None  # of a value of the weights in its own copy; None: it takes them as they are
    graph: bool = True  # may be captured in a CUDA graph
    on_request: bool = False  # takes part only where a pattern names it
    compiles: bool = False  # takes seconds for its first call: left out of smoke runs


_contestants: dict[str, list[Contestant]] = {op: [] for op in OPS}


def register(*contestants: Contestant) -> None:
    """ValueError for an op that is unknown, or a name that the op has."""
    for c in contestants:
        if c.op not in _contestants:
            raise ValueError(f"contestant {c.name!r} is for op {c.op!r}, expected one of {', '.join(OPS)}")
        if any(other.name == c.name for other in _contestants[c.op]):
            raise ValueError(f"op {c.op} already has a contestant {c.name!r}")
        unknown = [device for device in c.devices if device not in DEVICES]
        if unknown:
            raise ValueError(f"contestant {c.name!r} is for device {unknown[0]!r}, expected {' or '.join(DEVICES)}")
        _contestants[c.op].append(c)


def contestant(
    op: str, name: str = "", *, prepare: bool = False, devices: Sequence[str] = DEVICES, tolerance: float | None = None,
    graph: bool = True, enters: Callable[[Problem], bool] = lambda problem: True,
) -> Callable[[Function], Function]:  # fmt: skip
    """Decorator: the function is a contestant for `op`, called with the arguments of `grok_kernels.<op>`, in order.

    With `prepare` the function gets them once, untimed, and returns a function without arguments that is timed.
    `enters` picks problems: `enters=lambda p: p["format"] == "fp8"`. Others as in `Contestant`.
    """

    def add(function: Function) -> Function:
        def bind(inputs: Any) -> Call:
            args = inputs.args
            if prepare:
                call: Call = function(*args)
                return call
            return lambda: function(*args)

        register(
            Contestant(
                name=name or function.__name__, op=op, bind=bind, devices=devices, enters=enters, tolerance=tolerance,
                graph=graph,
            )
        )  # fmt: skip
        return function

    return add


def load(plugins: Sequence[str | Path] = ()) -> None:
    """Fill the registry: ours, the peers, then the contestants of these files. ValueError for a file that fails."""
    from . import ours, peers_cpu, peers_gpu, peers_torch

    if not any(c.ours for c in _contestants[OPS[0]]):
        for module in (ours, peers_torch, peers_cpu, peers_gpu):
            module.add()
    for file in plugins:
        try:
            runpy.run_path(str(file), run_name="grok_bench_plugin")
        except Exception as error:  # noqa: PERF203 - whatever it raises
            raise ValueError(f"--plugin {file}: {type(error).__name__}: {error}") from error


def entrants(problem: Problem, device: str, patterns: Sequence[str] = (), compiles: bool = True) -> list[Contestant]:
    """The contestants for a problem on `device` (cpu or cuda): all but those on request, or those that match."""

    def wanted(c: Contestant) -> bool:
        named = _matches(c.name, patterns) if patterns else not c.on_request
        return named and device in c.devices and (compiles or not c.compiles) and c.enters(problem)

    return [c for c in _contestants[problem.op] if wanted(c)]


def check(patterns: Sequence[str], problems: Sequence[Problem], device: str) -> None:
    """ValueError, with the names that there are, for a pattern that no contestant of these problems matches."""
    names = list(dict.fromkeys(c.name for problem in problems for c in entrants(problem, device, ["*"])))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no contestant matches {pattern!r}: there are {'; '.join(names) or 'none'}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
