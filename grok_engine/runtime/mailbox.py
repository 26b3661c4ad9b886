"""What lies between the thread that steps an engine and the event loop that reads one request's outputs."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

from .request import CompletionOutput, RequestOutput, TopLogprobs

AT_ONCE = 8  # consumers that run in one turn of an event loop


class Mailbox:
    """Holds what a consumer has not read yet: the newest output, or with `delta` all unread ones merged into one.

    So its size is bounded by the answer's, however slow the consumer is. The stepping thread calls `put`; one event
    loop at a time awaits `take`. No method takes a lock, because the garbage collector may call `leave` on any thread
    and inside any other method: `append` and `popleft` of a deque are atomic, and whoever popped an output owns it.
    """

    __slots__ = (
        "_error", "_unread", "aborted", "deadline", "delta", "key", "left", "loop", "request_id", "submitted",
        "waiter",
    )  # fmt: skip

    def __init__(self, request_id: str, key: str, deadline: float = math.inf) -> None:
        self.request_id = request_id  # as the user knows it
        self.key = key  # as the engine knows it: another one until the engine has dropped an aborted namesake
        self.deadline = deadline  # on time.monotonic
        self.delta = False
        self.loop: asyncio.AbstractEventLoop | None = None  # that may read here; once it is closed, nobody will
        self.submitted = self.aborted = False
        self.left = False  # nobody reads any more
        self.waiter: asyncio.Future[None] | None = None  # to resolve after `put` or `fail`
        self._unread: deque[RequestOutput | _Deltas] = deque()  # at most one
        self._error: Exception | None = None
        with suppress(RuntimeError):
            self.loop = asyncio.get_running_loop()

    def put(self, output: RequestOutput) -> None:
        """Add an output."""
        if self.left:
            return
        if output.request_id != self.request_id:
            output = replace(output, request_id=self.request_id)
        try:
            unread = self._unread.popleft()
        except IndexError:
            self._unread.append(output)
            return
        if self.delta:
            self._unread.append((unread if isinstance(unread, _Deltas) else _Deltas(unread)).add(output))
        else:
            self._unread.append(output)

    def fail(self, error: Exception) -> None:
        """Let the consumer raise `error` once it has read the rest."""
        self._error = error

    def leave(self) -> None:
        """Drop what is unread and all that comes, and end a `take` that waits."""
        self.left = True
        self._unread.clear()
        wake([self])

    async def take(self) -> RequestOutput:
        """The unread output, as soon as there is one. Raises what `fail` was given, or StopAsyncIteration once left."""
        self.loop = loop = asyncio.get_running_loop()
        while True:
            try:
                unread = self._unread.popleft()
            except IndexError:
                if self.left:
                    raise StopAsyncIteration from None
                if self._error is not None:
                    raise self._error from self._error.__cause__
            else:
                return unread.merged() if isinstance(unread, _Deltas) else unread
            self.waiter = loop.create_future()
            try:
                if not (self._unread or self._error or self.left):  # what came before this line found no waiter
                    await self.waiter
            finally:
                self.waiter = None


class OutputStream:
    """A request's outputs as an async iterator. Leaving it aborts the request: `aclose`, a cancelled task, or dropping
    the last reference to it. It may be read in any event loop, by one task at a time."""

    def __init__(self, mailbox: Mailbox, abort: Callable[[str], None]) -> None:
        self._mailbox, self._abort, self._ended = mailbox, abort, False

    @property
    def request_id(self) -> str:
        """The id that `AsyncLLM.abort` takes."""
        return self._mailbox.request_id

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        if self._mailbox.waiter is not None:
            raise RuntimeError(f"request {self.request_id!r}: another task reads this stream")
        try:
            output = await self._mailbox.take()
        except BaseException:
            self._leave()
            raise
        self._ended = output.finished
        return output

    async def aclose(self) -> None:
        """Abort the request unless it is finished. Does not wait for the engine."""
        self._leave()

    def __del__(self) -> None:
        self._leave()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"request {self.request_id!r}: a stream cannot be copied or pickled")

    def _leave(self) -> None:
        if not self._ended:
            self._ended = True
            self._mailbox.leave()
            self._abort(self._mailbox.key)


def wake(mailboxes: Iterable[Mailbox]) -> None:
    """Wake the consumers of these, with one call into each event loop: every such call is a system call."""
    waiters: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for mailbox in mailboxes:
        if (waiter := mailbox.waiter) is not None:
            waiters.setdefault(waiter.get_loop(), []).append(waiter)
    for loop, some in waiters.items():
        with suppress(RuntimeError):  # the loop is closed, and its consumers are gone
            loop.call_soon_threadsafe(_resolve, loop, some)


def _resolve(loop: asyncio.AbstractEventLoop, waiters: list[asyncio.Future[None]]) -> None:
    """Wake a few consumers, and the others in later turns of the loop: a step with many sequences wakes them all, and
    would hold up the loop's timers and sockets until each of them has run."""
    for waiter in waiters[:AT_ONCE]:
        if not waiter.done():
            waiter.set_result(None)
    if len(waiters) > AT_ONCE:
        loop.call_soon(_resolve, loop, waiters[AT_ONCE:])


class _Deltas:
    """Unread DELTA outputs as one."""

    __slots__ = ("_answers", "_last")

    def __init__(self, first: RequestOutput) -> None:
        self._last, self._answers = first, dict[int, _Answer]()
        self.add(first)

    def add(self, output: RequestOutput) -> _Deltas:
        scores = self._last.prompt_logprobs if output.prompt_logprobs is None else output.prompt_logprobs
        self._last = replace(output, outputs=[], prompt_logprobs=scores)
        for new in output.outputs:
            if new.index not in self._answers:
                self._answers[new.index] = _Answer()
            self._answers[new.index].add(new)
        return self

    def merged(self) -> RequestOutput:
        return replace(self._last, outputs=[self._answers[index].merged() for index in sorted(self._answers)])


class _Answer:
    """The unread deltas of one answer."""

    __slots__ = ("_last", "_logprobs", "_texts", "_token_ids")

    def __init__(self) -> None:
        self._texts, self._token_ids, self._logprobs = list[str](), list[int](), list[TopLogprobs]()

    def add(self, new: CompletionOutput) -> None:
        self._last = new
        self._texts.append(new.text)
        self._token_ids += new.token_ids
        self._logprobs += new.logprobs or ()

    def merged(self) -> CompletionOutput:
        logprobs = None if self._last.logprobs is None else self._logprobs
        return replace(self._last, text="".join(self._texts), token_ids=self._token_ids, logprobs=logprobs)
