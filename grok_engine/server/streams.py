"""From the engine's outputs to the bytes of an answer: whole, or as server-sent events while they come.

A client that leaves ends its requests at once. One that reads slowly makes `send` wait, and what the engine computes
meanwhile is merged in its mailbox: the memory of a stream is bounded by its answer, and the engine never waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, ParamSpec, Protocol, TypeVar

import msgspec
from starlette.types import Receive, Send

from grok_engine import OutputStream, RequestOutput

from .errors import ApiError, ClientLeftError, as_api_error

logger = logging.getLogger(__name__)
encode = msgspec.json.Encoder().encode
Headers = list[tuple[bytes, bytes]]
_EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_COMMENT = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
_P = ParamSpec("_P")
_T = TypeVar("_T")


class View(Protocol):
    """How the outputs of one request look to its client. at: which of its prompts an output belongs to."""

    def chunks(self, at: int, output: RequestOutput) -> bytes:
        """Events for what is new."""

    def last(self) -> bytes:
        """The event after all others, if there is one."""

    def whole(self, outputs: Sequence[RequestOutput]) -> Any:
        """The answer in one."""


def event(data: Any) -> bytes:
    return b"data: %b\n\n" % encode(data)


async def run(inline: bool, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function here, or on another thread where it would hold up the event loop."""
    return function(*args, **kwargs) if inline else await asyncio.to_thread(function, *args, **kwargs)


async def reply(send: Send, body: bytes, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """A JSON body as the whole response."""
    kept = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": kept})
    await send({"type": "http.response.body", "body": body})


class _Client:
    """Aborts the streams of a request when its client leaves, while the `with` block runs, and after it."""

    def __init__(self, receive: Receive, streams: Sequence[OutputStream]) -> None:
        self.left = False
        self._receive, self._streams = receive, streams

    async def __aenter__(self) -> _Client:
        self._task = asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._task.cancel()
        await self.abort()

    async def _watch(self) -> None:
        with suppress(OSError):  # how some servers say it
            while (await self._receive())["type"] != "http.disconnect":
                pass
        self.left = True
        await self.abort()

    async def abort(self) -> None:
        for stream in self._streams:
            await stream.aclose()


async def answer_whole(
    receive: Receive, send: Send, streams: Sequence[OutputStream], view: View, aborted: Callable[[], ApiError]
) -> None:
    """One JSON body, once all the prompts of a request are answered. aborted: what the client is told where the request
    was aborted, though the client has not left."""
    outputs: list[RequestOutput] = []
    async with _Client(receive, streams) as client:
        for stream in streams:
            outputs += [output async for output in stream if output.finished]
            if client.left:
                raise ClientLeftError
    for output in outputs:
        if (error := _failure(output, aborted)) is not None:
            raise error
    scored = any(o.prompt_logprobs or any(answer.logprobs for answer in o.outputs) for o in outputs)
    await reply(send, await run(not scored, lambda: encode(view.whole(outputs))))


def _failure(output: RequestOutput, aborted: Callable[[], ApiError]) -> ApiError | None:
    """Why an answer ended before its time, if one did: by its request's own fault, unless the step it was in failed."""
    for answer in output.outputs:
        if answer.error is not None:
            return ApiError(500 if answer.cause else 400, answer.error, code="generation_failed")
        if answer.finish_reason == "abort":
            return aborted()
    return None


async def answer_events(
    receive: Receive, send: Send, streams: Sequence[OutputStream], view: View, aborted: Callable[[], ApiError],
    keep_alive_seconds: float,
) -> None:  # fmt: skip
    """Server-sent events while the outputs come. An error after the first of them is an event too."""
    await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
    async with _Client(receive, streams) as client:
        events = _Events(send, keep_alive_seconds)
        try:
            if len(streams) == 1:
                await _pump(events, 0, streams[0], view, aborted)
            else:
                pumps = (_pump(events, at, stream, view, aborted) for at, stream in enumerate(streams))
                await asyncio.gather(*pumps)
            end = view.last()
        except Exception as error:
            if client.left or isinstance(error, ClientLeftError):
                raise ClientLeftError from error
            told = as_api_error(error)
            if told.status >= 500:
                logger.exception("a stream ended by an error")
            end = b"data: %b\n\n" % told.body()
        finally:
            await events.close()
        if client.left:
            raise ClientLeftError
        await send({"type": "http.response.body", "body": end + _DONE})


async def _pump(events: _Events, at: int, stream: OutputStream, view: View, aborted: Callable[[], ApiError]) -> None:
    async for output in stream:
        if (error := _failure(output, aborted)) is not None:  # after what was generated before it
            output = replace(output, outputs=[replace(answer, finish_reason=None) for answer in output.outputs])
        # Log-probabilities of a long prompt are many.
        if data := await run(output.prompt_logprobs is None, view.chunks, at, output):
            await events.write(data)
        if error is not None:
            raise error


class _Events:
    """Writes one event after the other, and a comment when there is none for a while, so that nobody on the way takes
    the connection for dead."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self._loop = asyncio.get_running_loop()
        self._written, self._waits, self._closed = self._loop.time(), False, False
        self._turn = asyncio.Lock()
        self._comment: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(seconds, self._tick)

    async def write(self, data: bytes) -> None:
        async with self._turn:  # of several prompts; the others' outputs are merged meanwhile
            if self._closed:
                raise ClientLeftError
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._written = self._loop.time()

    def _tick(self) -> None:
        silent = self._loop.time() - self._written
        if silent >= self._seconds and not self._turn.locked():  # locked: the client does not read, a comment no more
            self._comment = self._loop.create_task(self._say_something())
        self._timer = self._loop.call_later(max(self._seconds - silent, 0) or self._seconds, self._tick)

    async def _say_something(self) -> None:
        with suppress(OSError, ClientLeftError):
            await self.write(_COMMENT)

    async def close(self) -> None:
        self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()
        self._closed = True
