"""Whose turn it is: one call at a time may touch an engine's state."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class EngineBusyError(RuntimeError):
    """A call that needs the engine alone, while another call runs or requests are unfinished."""


class Turn:
    """Refuses a call before it touches anything: from another thread, from within the current call, or in a fork.

    What a signal handler raises, Ctrl-C say, does not keep the turn, wherever it falls: Python calls the handler when a
    function is entered or a call returns, so every such place lies in a `try`, and the turn knows its thread.
    """

    def __init__(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()  # the lock guards the next two, for an instant
        self._thread = 0  # that has the turn; 0: none
        self._call = ""  # that has the turn; "": it is a short one, which the others wait for

    @contextmanager
    def __call__(self, call: str) -> Iterator[None]:
        """Have the turn, for the call of this name. EngineBusyError if another one has it, RuntimeError in a fork."""
        self.check_process(call)
        if self.mine:
            raise EngineBusyError(f"{call}() was called from within {self._call}(): expected one call at a time")
        try:
            while not self.take(call):
                if other := self._call:
                    raise EngineBusyError(
                        f"{call}() was called while another thread runs {other}(): expected one call at a time"
                    )
                time.sleep(1e-5)
            yield
        finally:
            try:
                self.leave()
            except BaseException:  # a signal handler's, Ctrl-C say, fell in here
                self.leave()
                raise

    def take(self, call: str = "") -> bool:
        """Take the turn if it is free, without a name for an instant."""
        if os.getpid() != self._pid:
            return False  # a fork, in which nobody may ever release the lock
        with self._lock:
            if self._thread:
                return False
            self._call = call
            self._thread = threading.get_ident()
            return True

    def leave(self) -> None:
        """Give the turn back, if this thread has it."""
        if self.mine:
            self._thread = 0

    def check_process(self, call: str) -> None:
        """RuntimeError in a fork of the process that made the engine."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"{call}() in process {os.getpid()}, a fork of {self._pid}, where the engine was made: the threads of "
                "its kernels do not survive a fork. Make the engine after the fork, or start the child with spawn"
            )

    @property
    def mine(self) -> bool:
        """Whether a call on this thread has the turn."""
        return self._thread == threading.get_ident()
