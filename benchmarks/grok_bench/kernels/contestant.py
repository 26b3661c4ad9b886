"""The registry of contestants, and the decorator that puts anyone's function into it. It knows none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from . import ours
from .problems import Problem, ops

Call = Callable[[], Any]
Function = TypeVar("Function", bound=Callable[..., Any])
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to compute the problems of an op.

    `bind` takes one call's inputs and does what need not be timed, such as packing weights; its result is timed. Where
    that returns a function, the result is what the function returns, and the function is not timed.
    """

    name: str
    op: str
    bind: Callable[[Any], Call]
    ours: bool = False
    devices: Sequence[str] = DEVICES
    formats: Sequence[str] = ()  # of weights and rows that it takes; none: any
    enters: Callable[[Problem], bool] = lambda problem: True  # whether it takes such a problem
    missing: Callable[[], str] = lambda: ""  # why it cannot run here, and how to get it
    instead: Callable[[Any], Any] | None = None  # maps the inputs to those it can compute; checked against those
    within: Callable[[], AbstractContextManager[Any]] = nullcontext  # around each call, outside its time
    tolerance: float | None = None  # where not the problem's
    weight_bytes: float | None = None  # of a weight in its own copy; None: it takes them as they are
    prepares_rows: bool = False  # untimed, so that after a change of the rows it must be bound again
    source: tuple[str, str] | None = None  # the file and the name of a plug-in's function
    on_request: bool = False  # takes part only where a pattern names it
    compiles: bool = False  # its first call takes seconds: left out of smoke runs


_contestants: dict[str, list[Contestant]] = {}


def register(*contestants: Contestant) -> None:
    """ValueError for an unknown op or device, or a name that the op has already."""
    for c in contestants:
        if c.op not in ops():
            raise ValueError(f"contestant {c.name!r} is for op {c.op!r}, expected one of {', '.join(ops())}")
        if any(other.name == c.name for other in _contestants.get(c.op, ())):
            raise ValueError(f"op {c.op} already has a contestant {c.name!r}")
        unknown = [device for device in c.devices if device not in DEVICES]
        if unknown:
            raise ValueError(f"contestant {c.name!r} is for device {unknown[0]!r}, expected {' or '.join(DEVICES)}")
        _contestants.setdefault(c.op, []).append(c)


def contestant(op: str, name: str = "", *, prepare: bool = False, **options: Any) -> Callable[[Function], Function]:
    """Decorator: the function is a contestant for `op`, called with its arguments, as `grok_kernels.<op>` has them.

    With `prepare` the function gets them once, untimed, and returns a function without arguments that is timed.
    `enters` picks problems: `enters=lambda p: p["format"] == "fp8"`. Other options are members of `Contestant`.
    """

    def add(function: Function) -> Function:
        def bind(inputs: Any) -> Call:
            args = ours.arguments(inputs.args)
            if prepare:
                call: Call = function(*args)
                return call
            return lambda: function(*args)

        source = None if prepare else (function.__code__.co_filename, function.__name__)
        register(Contestant(name=name or function.__name__, op=op, bind=bind, source=source, **options))
        return function

    return add


def everyone() -> list[Contestant]:
    return [c for several in _contestants.values() for c in several]


def entrants(problem: Problem, device: str, patterns: Sequence[str] = (), compiles: bool = True) -> list[Contestant]:
    """The contestants for a problem on `device` (cpu or cuda): all but those on request, or those that match."""

    def wanted(c: Contestant) -> bool:
        named = any(fnmatchcase(c.name, pattern) for pattern in patterns) if patterns else not c.on_request
        takes = (not c.formats or problem["format"] in c.formats) and c.enters(problem)
        return named and device in c.devices and (compiles or not c.compiles) and takes

    return [c for c in _contestants.get(problem.op, ()) if wanted(c)]


def check(patterns: Sequence[str], problems: Sequence[Problem], device: str) -> None:
    """ValueError, with the names that there are, for a pattern that no contestant of these problems matches."""
    names = list(dict.fromkeys(c.name for problem in problems for c in entrants(problem, device, ["*"])))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no contestant matches {pattern!r}: there are {'; '.join(names) or 'none'}")
