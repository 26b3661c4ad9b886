"""`grok-engine serve`: the app in a process of its own, by uvicorn, with the limits that uvicorn lacks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Iterator

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from grok_engine import AsyncLLM

from .errors import ApiError

logger = logging.getLogger(__name__)
MAX_HEADER_BYTES = 32768
KEEP_ALIVE_SECONDS = 10  # between two requests of a connection
HEADER_SECONDS = 15.0  # for a request line and its headers, however they trickle in
STALL_SECONDS = 60.0  # without any progress while a client is sent something
CLOSING_SECONDS = 5  # for clients to read the last bytes, after the last request has ended


class _Protocol(H11Protocol):
    """Closes connections that send no request, and those that do not read what they are sent."""

    _idle: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def _await_request(self) -> None:
        """The time for a request runs while there is none, however many bytes come."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel("_idle")
        elif self._idle is None:
            self._idle = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._check_progress(sys.maxsize)

    def _check_progress(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= before:
            self.transport.abort()
        else:
            self._stalled = self.loop.call_later(STALL_SECONDS, self._check_progress, left)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("_stalled")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel("_idle")
        self._cancel("_stalled")

    def _cancel(self, name: str) -> None:
        if (timer := getattr(self, name)) is not None:
            timer.cancel()
            setattr(self, name, None)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's, with a body in OpenAI's form: for what is no HTTP, or has too large headers."""
        body = ApiError(400, msg).body()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs it."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. OSError if the address is taken: before a model is loaded in vain."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return found


def log_to_stderr(level: int) -> None:
    """A line with the time for each request, of the server alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger(__package__)
    ours.addHandler(handler)
    ours.setLevel(level)
    ours.propagate = False


def serve(llm: AsyncLLM, app: ASGIApp, on: socket.socket, *, drain_seconds: float) -> None:
    """Serve `app` until SIGINT or SIGTERM, and close `llm`. The first signal lets requests finish, for `drain_seconds`
    at most, while new ones get status 503; the second ends all at once."""
    asyncio.run(_serve(llm, app, on, drain_seconds))


def server_of(app: ASGIApp) -> uvicorn.Server:
    """uvicorn with our limits, to be run in any event loop; it leaves signals alone."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="error",
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    return _Server(config)


async def _serve(llm: AsyncLLM, app: ASGIApp, on: socket.socket, drain_seconds: float) -> None:
    _raise_file_limit()
    server = server_of(app)
    draining: list[asyncio.Task[None]] = []

    async def drain() -> None:
        if not await llm.drain(drain_seconds):
            logger.warning("requests were aborted: they ran for more than %g s after the signal", drain_seconds)
        server.should_exit = True

    def stop(number: signal.Signals) -> None:
        if draining:
            logger.warning("%s again: stopping at once", number.name)
            server.should_exit = server.force_exit = True
            for connection in list(server.server_state.connections):
                connection.transport.abort()
        else:
            logger.info("%s: finishing %d requests, up to %g s", number.name, llm.stats().requests, drain_seconds)
            draining.append(asyncio.ensure_future(drain()))

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    address = on.getsockname()
    host = f"[{address[0]}]" if on.family == socket.AF_INET6 else address[0]
    async with llm:
        serving = asyncio.ensure_future(server.serve(sockets=[on]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        print(f"listening on http://{host}:{address[1]}", flush=True)
        await serving


def _raise_file_limit() -> None:
    """As many connections as the system lets us have: the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
