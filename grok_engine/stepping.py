"""The threads of an AsyncLLM: one steps the engine, some compile grammars. They start on demand and end when idle."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import count

from .engine import LLMEngine
from .errors import EngineBusyError, EngineClosedError, QueueFullError
from .log import QuietLogger
from .runtime.mailbox import Mailbox, wake
from .runtime.request import Request, RequestOutput

logger = QuietLogger(__name__)
_COMPILERS = 4  # threads at most, so that one slow grammar does not delay the next
_LINGER = (
    0.1  # seconds that an idle thread waits for the next request: a new one costs a millisecond of OpenMP's set-up
)
_SWEEP = 0.05  # seconds between two looks for passed deadlines and closed event loops
_BUSY = 0.0002  # seconds to wait while another thread has the engine, for `logits` say


class Stepper:
    """Runs the requests of mailboxes on an engine, from `register` to the request's last output.

    Any thread may call it. The lock is held for moments, and never by what the garbage collector may run.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self.refusal: str | None = None  # why there can be no new request
        self._pid, self._ids = os.getpid(), count()
        self._next_sweep, self._raised = 0.0, False  # the stepping thread's own
        self._lock = threading.Lock()  # of all that follows
        self._work = threading.Condition(self._lock)
        self._mailboxes: dict[str, Mailbox] = {}  # by key
        self._by_id: dict[str, Mailbox] = {}  # by request_id; of namesakes the newest
        self._idle: list[Future[None]] = []  # to resolve when no request is left
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()  # for the stepping thread
        self._grammars: deque[tuple[Mailbox, Request]] = deque()  # to compile
        self._thread: threading.Thread | None = None  # that steps
        self._compilers = 0
        self._threads: list[threading.Thread] = []

    # Requests

    def register(self, request_id: str | None, deadline: float) -> Mailbox:
        """A mailbox for a new request. EngineClosedError if there can be none, ValueError if the id is in use,
        QueueFullError if `max_waiting` requests wait for their first step or their grammar."""
        self._check_caller()
        if not isinstance(request_id, (str, type(None))):
            raise ValueError(f"request_id={request_id!r} is not text, or None")
        with self._lock:
            if self.refusal is not None:
                raise EngineClosedError(self.refusal)
            key = request_id = f"async-{next(self._ids)}" if request_id is None else request_id
            waiting, most = self.engine.num_waiting + len(self._grammars), self.engine.config.max_waiting
            if waiting >= most:
                raise QueueFullError(f"{waiting} requests wait: expected fewer than max_waiting={most}")
            namesake = self._by_id.get(request_id)
            if namesake is not None and not namesake.left:
                raise ValueError(f"request_id={request_id!r} is in use")
            while key in self._mailboxes:  # its consumer left, but the engine still has the request
                key = f"{request_id}#{next(self._ids)}"
            mailbox = self._mailboxes[key] = self._by_id[request_id] = Mailbox(request_id, key, deadline)
            return mailbox

    def find(self, request_id: str) -> list[Mailbox]:
        """The mailbox of an unfinished request, if there is one."""
        with self._lock:
            return [self._by_id[request_id]] if request_id in self._by_id else []

    def all(self) -> list[Mailbox]:
        """The mailboxes of all unfinished requests."""
        with self._lock:
            return list(self._mailboxes.values())

    def submit(self, mailbox: Mailbox, request: Request) -> None:
        """Compile the request's grammar, if it has one, and queue it. Raises what `LLMEngine.submit` does."""
        self.engine.submit(request)
        mailbox.submitted = True
        try:
            if mailbox.left or mailbox.aborted:  # before the engine knew the request
                self.engine.abort_request(mailbox.key)
            with self._lock:
                self._start()
        except BaseException:
            self.engine.discard_request(mailbox.key)
            raise

    def submit_later(self, mailbox: Mailbox, request: Request) -> None:
        """`submit`, on another thread; its errors go to the mailbox."""
        with self._lock:
            if self._compilers < _COMPILERS:
                self._spawn(self._compile)
                self._compilers += 1
            self._grammars.append((mailbox, request))

    def abort(self, mailboxes: Iterable[Mailbox]) -> None:
        """End these requests with what they have."""
        for mailbox in mailboxes:
            mailbox.aborted = True
            self.engine.abort_request(mailbox.key)

    def forget(self, mailboxes: Iterable[Mailbox]) -> None:
        """Nothing more will come for these."""
        idle: list[Future[None]] = []
        with self._lock:
            for mailbox in mailboxes:
                if self._mailboxes.get(mailbox.key) is mailbox:
                    del self._mailboxes[mailbox.key]
                if self._by_id.get(mailbox.request_id) is mailbox:
                    del self._by_id[mailbox.request_id]
            if not self._mailboxes:
                idle, self._idle = self._idle, idle
        for future in idle:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    # Commands

    def idle(self) -> Future[None]:
        """Resolved once no request is left."""
        self._check_caller()
        future = Future[None]()
        with self._lock:
            self._idle.append(future)
        self.forget([])
        return future

    def call(self, function: Callable[[], None]) -> Future[None]:
        """Run a function on the stepping thread, between two steps. It cannot be cancelled."""
        self._check_caller()
        future = Future[None]()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._start()
            self._commands.append((function, future))  # the thread looks once the lock is free
        return future

    def close(self) -> None:
        """On the stepping thread: end every request with EngineClosedError, and close the engine."""
        with self._lock:
            self._grammars.clear()
        self._end(self.all(), EngineClosedError("the engine was closed"))
        for thread in self.threads():
            if thread is not threading.current_thread():
                thread.join()
        while not self.engine.closed:
            self._close_engine()

    def _close_engine(self) -> None:
        try:
            self.engine.close()
        except EngineBusyError:
            time.sleep(_BUSY)

    def threads(self) -> list[threading.Thread]:
        """Those that have not ended."""
        with self._lock:
            return [thread for thread in self._threads if thread.is_alive()]

    # Threads

    def _check_caller(self) -> None:
        """RuntimeError in a fork. EngineBusyError on the stepping thread, which would wait for itself."""
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"process {os.getpid()} is a fork of {self._pid}, where this AsyncLLM was made: its threads are not "
                "here. Make engine and AsyncLLM after the fork, or start the child with spawn"
            )
        if self._thread is threading.current_thread():
            raise EngineBusyError("an AsyncLLM was called from within a step: expected a call from outside")

    def _spawn(self, target: Callable[[], None]) -> threading.Thread:
        thread = _Worker(target=target, name="grok-engine")
        thread.start()
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        return thread

    def _start(self) -> None:
        self._work.notify()
        if self._thread is None or not self._thread.is_alive():
            self._thread = self._spawn(self._run)

    def _compile(self) -> None:
        while True:
            with self._lock:
                if not self._grammars:
                    self._compilers -= 1
                    return
                mailbox, request = self._grammars.popleft()
            try:
                if mailbox.left:
                    self.forget([mailbox])
                else:
                    self.submit(mailbox, request)
            except BaseException as error:  # what native code raises when it panics is no Exception
                self.forget([mailbox])
                mailbox.fail(error if isinstance(error, Exception) else _wrapped(error))
                wake([mailbox])

    def _run(self) -> None:
        try:
            while self._has_work():
                while self._commands:
                    _obey(*self._commands.popleft())
                self._sweep()
                self._step()
        except BaseException as error:
            logger.error("the stepping thread ended", exc_info=True)
            with self._lock:
                self._thread = None
                mailboxes = list(self._mailboxes.values())
                commands, self._commands = self._commands, deque()
            for _, future in commands:
                future.set_exception(_wrapped(error))
            self._end(mailboxes, _wrapped(error))

    def _has_work(self) -> bool:
        def now() -> bool:
            return bool(self._commands) or (not self.engine.closed and self.engine.has_unfinished_requests())

        with self._lock:
            if now() or (not self.engine.closed and self._work.wait_for(now, _LINGER)):
                return True
            self._thread = None
            lost = [mailbox for mailbox in self._mailboxes.values() if mailbox.submitted]
        self._end(lost, RuntimeError("the engine dropped the request: was it stepped or closed by others?"))
        return False

    def _sweep(self) -> None:
        """Abort requests whose time is over or whose event loop is closed."""
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP
            if _program_has_ended():
                self._end(self.all(), RuntimeError("the program has ended"))
            self.abort(
                m for m in self.all() if not m.aborted and (now >= m.deadline or (m.loop and m.loop.is_closed()))
            )

    def _step(self) -> None:
        if not self.engine.has_unfinished_requests():
            return
        try:
            outputs = self.engine.step()
        except EngineBusyError:
            time.sleep(_BUSY)
            return
        except BaseException:
            if self.engine.closed or self._raised:
                raise
            self._raised = True  # the next step returns the outputs of the requests that this one ended
            return
        self._raised = False
        self._deliver(outputs)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        found = [(m, output) for output in outputs if (m := self._mailboxes.get(output.request_id)) is not None]
        self.forget(m for m, output in found if output.finished)  # first: whoever reads it can use the id again
        for mailbox, output in found:
            mailbox.put(output)
        wake(mailbox for mailbox, _ in found)

    def _end(self, mailboxes: Iterable[Mailbox], error: Exception) -> None:
        """End these requests with an error of this kind, or with EngineClosedError if the engine is closed."""
        mailboxes = list(mailboxes)
        kind = EngineClosedError if self.engine.closed else type(error)
        for mailbox in mailboxes:
            own = kind(str(error))  # each consumer's traceback grows on its own
            own.__cause__ = error.__cause__
            mailbox.aborted = True
            mailbox.fail(own)
            if not self.engine.closed:
                self.engine.discard_request(mailbox.key)
        self.forget(mailboxes)
        wake(mailboxes)


class _Worker(threading.Thread):
    """Keeps no program alive: see `_program_has_ended`. A daemon could be in native code while Python shuts down."""


def _program_has_ended() -> bool:
    """Whether the interpreter waits for this thread alone, or for others like it, to shut down."""
    return not threading.main_thread().is_alive() and not any(
        t.is_alive() and not t.daemon and not isinstance(t, _Worker) for t in threading.enumerate()
    )


def _obey(function: Callable[[], None], future: Future[None]) -> None:
    try:
        function()
    except BaseException as error:
        future.set_exception(error if isinstance(error, Exception) else _wrapped(error))
    else:
        future.set_result(None)


def _wrapped(error: BaseException) -> RuntimeError:
    """An Exception for a consumer: raised there, a CancelledError or a KeyboardInterrupt would mean something else."""
    if isinstance(error, EngineClosedError):
        return error
    wrapped = RuntimeError(f"a thread of the engine ended by {error!r}")
    wrapped.__cause__ = error
    return wrapped
