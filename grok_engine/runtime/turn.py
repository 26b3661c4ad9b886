"""Whose turn it is: one call at a time may touch an engine's state, and others ask it for changes."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakMethod

from grok_engine.errors import EngineBusyError


class Turn:
    """Refuses a call before it touches anything: from another thread, from within the current call, or in a fork.

    A change that may come from anywhere is asked for instead: it is made at once if the turn is free, else by the call
    that has it, at its end at the latest. A change that is interrupted half-way leaves `intact` False; `mend` is called
    before the next one, and sets it again.

    What a signal handler raises, Ctrl-C say, does not keep the turn, wherever it falls: Python calls the handler when a
    function is entered or a call returns, so every such place lies in a `try`, and the turn knows its thread.
    """

    def __init__(self, mend: Callable[[BaseException], None]) -> None:
        self.intact = True
        self._mend = WeakMethod(mend)  # no cycle: an engine that is dropped frees its weights at once
        self.asked: deque[tuple[Callable[[Any], None], Any]] = deque()  # changes and their arguments, in order
        self._lock, self._pid = threading.RLock(), os.getpid()  # the lock guards the next two, for an instant
        self._thread = 0  # that has the turn; 0: none
        self._call = ""  # that has the turn; "": it is a short one, which the others wait for

    @contextmanager
    def __call__(self, call: str) -> Iterator[None]:
        """Have the turn, for the call of this name. EngineBusyError if another one has it, RuntimeError in a fork.

        What was asked for meanwhile is done when the turn is left.
        """
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
            self._catch_up()

    def ask(self, change: Callable[[Any], None], argument: Any) -> None:
        """Have `change(argument)` made. Waits for nobody."""
        self.asked.append((change, argument))
        self._catch_up()

    def settle(self) -> None:
        """Make the changes that were asked for. Only who has the turn may."""
        if not self.intact:
            mend = self._mend()
            assert mend is not None
            mend(RuntimeError("a change of requests or pages was interrupted"))
        while self.asked:
            self.intact = False
            change, argument = self.asked[0]
            try:
                change(argument)
            except Exception:
                self.asked.popleft()  # it would fail again
                raise
            self.asked.popleft()
            self.intact = True

    def _catch_up(self) -> None:
        """`settle`, unless another call has the turn: it does so when it leaves."""
        while self.asked and not self.mine:
            try:
                if not self.take():
                    return
                self.settle()
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
