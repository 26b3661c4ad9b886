"""A contestant at one problem, in this process or in one of its own: checked once, then timed call by call."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from . import cases, contestant
from .case import Case, error
from .contestant import Contestant
from .device import Device, device
from .problems import Problem, select


class TooLong(Exception):
    """A call that took longer than the limit."""


class Failed(Exception):
    """A call that raised, or whose process died; the text says how."""


class Refused(Failed):
    """A call that this contestant has no kernel for, as it says itself."""


class Entrant(Protocol):
    def check(self) -> float:
        """Prepare, call once, and return the error of the result. TooLong, Failed."""

    def time(self, turn: int) -> float:
        """The seconds of one call with the inputs of that turn. TooLong, Failed."""

    def close(self) -> None: ...


class Local:
    """In this process: what hangs in native code or ends the process ends the run."""

    def __init__(self, c: Contestant, case: Case, where: Device, limit: float) -> None:
        self._contestant, self._case, self._device, self._limit = c, case, where, limit
        self.calls: list[Any] = []

    def check(self) -> float:
        c, case, where = self._contestant, self._case, self._device
        inputs = [c.instead(i) if c.instead else i for i in case.inputs]
        with self._guarded(), c.within():
            first = c.bind(inputs[0])
            case.reset(inputs[0])
            got = first()
            got = case.shown(got() if callable(got) else got, inputs[0])
            where.synchronize()
        found = error(got, case.expected(inputs[0]))
        if found <= self.tolerance:
            with self._guarded(), c.within():
                for i in inputs:
                    call = first if i is inputs[0] else c.bind(i)
                    call()  # warm
                    self.calls.append(where.ready(call, c.graph))
        return found

    @property
    def tolerance(self) -> float:
        own = self._contestant.tolerance
        return self._case.tolerance if own is None else own

    def time(self, turn: int) -> float:
        with self._guarded(), self._contestant.within():
            self._device.flush()
            return self._device.seconds(self.calls[turn % len(self.calls)])

    def close(self) -> None:
        self.calls.clear()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            with limited(self._limit):
                yield
        except TooLong:
            raise
        except NotImplementedError as error:
            raise Refused(str(error)) from None
        except Exception as error:  # whatever one contestant raises, the others run
            self._device.recover()
            raise Failed(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from None


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TooLong once so many have passed: as soon as Python runs again, so not inside of a native call."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Task:
    """What another process needs to do the same as this one."""

    problem: str
    small: bool
    contestant: str
    device: str
    threads: int
    plugins: Sequence[str]
    limit: float


class Remote:
    """In a process of its own, which may hang, or die, and is ended."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self._limit = task.limit
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(task, other), daemon=True)
        self._process.start()
        other.close()
        try:
            self._ask("ready?", more=60.0)  # imports, and the data
        except (TooLong, Failed):
            self.close()
            raise

    def check(self) -> float:
        return self._ask("check", more=self._limit)

    def time(self, turn: int) -> float:
        return self._ask(turn)

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _ask(self, what: str | int, more: float = 0.0) -> float:
        try:
            self._pipe.send(what)
            if not self._pipe.poll(self._limit + more):
                raise TooLong
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise Failed(f"its process ended with status {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return float(answer)


def _serve(task: Task, pipe: Connection) -> None:
    """The other process: answers each question with a number, or with what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    torch.set_num_threads(task.threads)
    entrant: Local | None = None
    with torch.inference_mode():
        while True:
            try:
                question = pipe.recv()
            except EOFError:
                return
            try:
                if entrant is None:
                    entrant = _enter(task)
                    pipe.send(0.0)
                else:
                    pipe.send(entrant.check() if question == "check" else entrant.time(question))
            except (TooLong, Failed) as error:
                pipe.send(error)
            except Exception as error:  # of the data
                pipe.send(Failed(f"{type(error).__name__}: {error}"))


def _enter(task: Task) -> Local:
    contestant.load(task.plugins)
    (problem,) = (p for p in _candidates(task) if p.name == task.problem)
    where = device(task.device, task.small, probed=False)
    (c,) = (c for c in contestant.entrants(problem, where.kind, ["*"]) if c.name == task.contestant)
    return Local(c, cases.build(problem, where.name, where.cold), where, task.limit)


def _candidates(task: Task) -> list[Problem]:
    if not task.small:
        return select([task.problem])
    op, model = task.problem.split("/")[:2]
    whole = select([f"{op}/{model.removesuffix('-smoke')}/*"])
    return list({p.small().name: p.small() for p in whole}.values())
