"""A contestant at one problem, in this process or in one of its own: checked once, then timed call by call."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from .case import Case, Watch, error, misfit
from .contestant import Contestant
from .device import Device

IMPORTS = 60.0  # seconds more for the first answer of a process, which imports and makes its data


class Dropped(Exception):
    """A contestant takes no further part. `args`: its status from now on, why, and the error of its result if known.

    "wrong" if its result is not of the values, shape, dtype and stride that are due, or it changes an input, "failed"
    if a call raised or its process died, "timeout" if a call took longer than the limit, "missing" if it says itself
    that it has no kernel for the call.
    """


class Entrant(Protocol):
    def check(self, again: bool = False) -> float | None:
        """Prepare, call once, and return the error of the result, if it can be compared. Dropped, if it is too large.

        `again`: after the timing, what was timed is called with inputs that were changed in place meanwhile.
        """

    def time(self, turn: int) -> float:
        """The seconds of one call with the inputs of that turn. Dropped."""

    def close(self) -> None: ...


class Local:
    """In this process: native code that hangs or ends the process ends the run.

    A call may take `limit` seconds, and none goes on after `end`, a time of `time.perf_counter()`.
    """

    def __init__(self, c: Contestant, case: Case, where: Device, limit: float, end: float = inf) -> None:
        self.contestant, self.case, self.device, self._limit, self._end = c, case, where, limit, end
        self.calls: list[Any] = []

    def check(self, again: bool = False) -> float:
        c, case, where = self.contestant, self.case, self.device
        case.change(again)
        inputs = [c.instead(i) if c.instead else i for i in (case.inputs[:1] if again else case.inputs)]
        expected, watch = case.truth(c.instead), Watch(case.watched(inputs[0]))
        with self._guarded():
            call = self.calls[0] if again and not c.prepares_rows else c.bind(inputs[0])
            case.reset(inputs[0])
            got = call()
            got = got() if callable(got) else got
            shown = case.shown(got, inputs[0])
            where.synchronize()
        if names := watch.changed():
            raise Dropped("wrong", f"it changes its input {', '.join(names)}")
        if why := misfit(got, case.due(inputs[0]) if case.due else expected):
            raise Dropped("wrong", why)
        found, allowed = error(shown, expected), case.tolerance if c.tolerance is None else c.tolerance
        if not found <= allowed:
            when = ", after the timing, with inputs changed in place" if again else ""
            raise Dropped("wrong", f"error {found:.1e} where {allowed:.1e} is allowed{when}", found)
        if not again:
            with self._guarded():
                for i in inputs:
                    ready = call if i is inputs[0] else c.bind(i)
                    ready()  # warm-up
                    self.calls.append(where.ready(ready))
        return found

    def time(self, turn: int) -> float:
        with self._guarded():
            self.device.flush()
            return self.device.seconds(self.calls[turn % len(self.calls)])

    def close(self) -> None:
        self.calls.clear()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with limited(self._limit, self._end), self.contestant.within():
                yield
        except Dropped:
            raise
        except NotImplementedError as error:
            raise Dropped("missing", str(error)) from None
        except Exception as error:  # whatever one contestant raises, the others run
            self.device.recover()
            raise Dropped("failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from None


@contextmanager
def limited(seconds: float, end: float = inf) -> Iterator[None]:
    """Raise Dropped after the time is over, as soon as Python runs again: a native call is not interrupted."""
    left = end - time.perf_counter()
    if left <= 0:
        raise _too_long(seconds, left)
    if threading.current_thread() is not threading.main_thread() or min(seconds, left) == inf:
        yield
        return

    over = list[Dropped]()

    def stop(*_: Any) -> None:
        over.append(_too_long(seconds, left))
        raise over[0]

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, left))
    try:
        yield
    except Exception:  # a compiler may wrap what it is stopped by
        if over:
            raise over[0] from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _too_long(limit: float, left: float = inf) -> Dropped:
    """`left`: the seconds that there were until the end of the whole run. That they were few is nobody's failure."""
    if left < limit:
        return Dropped("noisy", "the cap on the time of the whole run was reached")
    return Dropped("timeout", f"more than {limit:g} s a call")


class Remote:
    """In a process of its own, which may hang or die: the one that `enter(*args)` makes there. Dropped."""

    def __init__(self, enter: Callable[..., Entrant], args: tuple[Any, ...], limit: float, end: float = inf) -> None:
        context = multiprocessing.get_context("spawn")
        self._limit, self._end = limit, end
        self._pipe, other = context.Pipe()
        given = (enter, args, torch.get_num_threads(), other)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        other.close()

    def check(self, again: bool = False) -> float | None:
        if not again:
            self._ask("enter", more=IMPORTS)
        error: float | None = self._ask("again" if again else "check", more=self._limit)
        return error

    def time(self, turn: int) -> float:
        return float(self._ask(turn))

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _ask(self, what: str | int, more: float = 0.0) -> Any:
        try:
            self._pipe.send(what)
            left = self._end - time.perf_counter()
            if not self._pipe.poll(max(0.0, min(self._limit + more, left))):
                raise _too_long(self._limit + more, left)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise Dropped("failed", f"its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(enter: Callable[..., Entrant], args: tuple[Any, ...], threads: int, pipe: Connection) -> None:
    """The other process: answers each question with a number, or with what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    entrant: Entrant | None = None
    with torch.inference_mode():
        while True:
            try:
                question = pipe.recv()
            except EOFError:
                return
            try:
                if entrant is None:
                    entrant = enter(*args)
                    pipe.send(None)
                else:
                    checked = question in ("check", "again")
                    pipe.send(entrant.check(question == "again") if checked else entrant.time(question))
            except Dropped as dropped:
                pipe.send(dropped)
            except Exception as error:  # of the data
                pipe.send(Dropped("failed", f"{type(error).__name__}: {error}"))
