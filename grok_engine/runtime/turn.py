"""Whose turn it is: one call at a time may touch an engine's state."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class EngineBusyError(RuntimeError):
    """A call that needs the engine alone, while another call runs or requests are unfinished."""


def uninterrupted(clean_up: Callable[[], None]) -> None:
    """Run what a `finally` has to do, again if a Ctrl-C falls into it. An interrupt comes at the entry of a function or
    after a call, so that none gets between a `finally` and this."""
    try:
        clean_up()
    except KeyboardInterrupt:
        clean_up()
        raise


class Turn:
    """Refuses a call before it touches anything: from another thread, from within the current call, or in a fork.

    Nobody waits here. The lock knows its owner, so that it is released even where an interrupt falls between two
    statements.
    """

    def __init__(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._name = ""  # of the call that has the turn

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Have the turn, for the call of this name. EngineBusyError if another call has it, RuntimeError in a fork."""
        self.check_process(name)
        if self._mine:
            raise EngineBusyError(f"{name}() was called from within {self._name}(): expected one call at a time")
        try:
            if not self.take(name):
                raise EngineBusyError(
                    f"{name}() was called while another thread runs {self._name}(): expected one call at a time"
                )
            yield
        finally:
            uninterrupted(self.leave)

    def take(self, name: str) -> bool:
        """Take the turn if it is free."""
        if os.getpid() != self._pid or self._mine or not self._lock.acquire(blocking=False):
            return False
        self._name = name
        return True

    def leave(self) -> None:
        """Give the turn back, if this thread has it."""
        if self._mine:
            self._lock.release()

    def check_process(self, name: str) -> None:
        """RuntimeError in a fork of the process that made the engine."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"{name}() in process {os.getpid()}, a fork of {self._pid}, where the engine was made: the threads of "
                "its kernels do not survive a fork. Make the engine after the fork, or start the child with spawn"
            )

    @property
    def _mine(self) -> bool:
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]
