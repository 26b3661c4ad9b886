"""Clients of every kind for a server: honest, slow, leaving, malformed, oversized, half closed, and those that trickle.

Each speaks through a socket of its own and checks what it gets: a stream must be the one that its request gives alone,
and what is no request must be refused or cut off, within `PATIENCE` seconds.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import h11

from grok_bench.engine.sse import EventStream

PATIENCE = 60.0
UNREAD = 600  # tokens that a client asks for who reads hardly any
CLOSED = (ConnectionError, h11.RemoteProtocolError)


@dataclass(frozen=True)
class Case:
    """A request, and the answer that it gets alone."""

    body: dict[str, Any]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)


class Client:
    """One connection. `window`: bytes of the socket's receive buffer, so that a slow reader soon stops the server."""

    def __init__(self, port: int, window: int | None = None) -> None:
        self._port, self._http = port, h11.Connection(our_role=h11.CLIENT)
        self._loop = asyncio.get_running_loop()
        self.socket = socket.socket()
        self.socket.setblocking(False)
        if window is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)

    async def __aenter__(self) -> Client:
        await self._loop.sock_connect(self.socket, ("127.0.0.1", self._port))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.socket.close()

    async def write(self, data: bytes) -> None:
        await asyncio.wait_for(self._loop.sock_sendall(self.socket, data), PATIENCE)

    async def post(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        headers = [("host", "a"), ("content-type", "application/json"), ("content-length", str(len(data)))]
        asked = (h11.Request(method="POST", target="/v1/completions", headers=headers), h11.Data(data=data))
        await self.write(b"".join(self._http.send(part) or b"" for part in (*asked, h11.EndOfMessage())))

    async def parts(self, size: int = 65536, pause: float = 0.0) -> AsyncIterator[Any]:
        """The parts of the answer, read `size` bytes at a time after a `pause`; raises one of CLOSED if it is cut."""
        while True:
            part = self._http.next_event()
            if part is h11.NEED_DATA:
                await asyncio.sleep(pause)
                self._http.receive_data(await asyncio.wait_for(self._loop.sock_recv(self.socket, size), PATIENCE))
                continue
            yield part
            if isinstance(part, (h11.EndOfMessage, h11.ConnectionClosed)):
                return

    async def answer(self, size: int = 65536, pause: float = 0.0) -> tuple[int, bytes]:
        """The status and the body of the answer."""
        status, body = 0, b""
        async for part in self.parts(size, pause):
            if isinstance(part, h11.Response):
                status = part.status_code
            elif isinstance(part, h11.Data):
                body += part.data
        return status, body

    async def end(self) -> bytes:
        """Whatever comes until the server closes the connection. TimeoutError if it does not."""
        found = b""

        async def read() -> None:
            nonlocal found
            try:
                while data := await self._loop.sock_recv(self.socket, 65536):
                    found += data
            except ConnectionError:
                pass

        await asyncio.wait_for(read(), PATIENCE)
        return found


def check(case: Case, body: bytes) -> None:
    """A whole stream has the text and the tokens of the request alone."""
    text, ids, finished = "", [], None
    said = EventStream().feed(body)
    assert said[-1] == "[DONE]"
    for event in said[:-1]:
        (choice,) = json.loads(event)["choices"]
        text, ids, finished = text + choice["text"], ids + choice["token_ids"], choice["finish_reason"]
    assert (text, ids, finished) == (case.text, case.token_ids, "length"), case.body


async def honest(port: int, case: Case, rng: random.Random, **reading: Any) -> None:
    """Read the stream to its end; come again while the queue is full."""
    while True:
        async with Client(port, window=2048 if reading else None) as client:
            await client.post(case.body)
            status, body = await client.answer(**reading)
        if status != 429:
            break
        await asyncio.sleep(rng.uniform(0.1, 0.5))
    assert status == 200, body
    check(case, body)


async def slow(port: int, case: Case, rng: random.Random) -> None:
    await honest(port, case, rng, size=rng.choice([100, 300]), pause=rng.uniform(0.001, 0.01))


async def leaving(port: int, case: Case, rng: random.Random) -> None:
    """Go at any time: before the body is whole, at once after it, or after a part of the answer; also by a reset."""
    async with Client(port) as client:
        if rng.random() < 0.2:
            await client.write(HEAD + b"content-length: 50\r\n\r\n{")
        else:
            await client.post({**case.body, "max_tokens": UNREAD})
            parts = client.parts(size=300)
            for _ in range(rng.choice([0, 0, 1, 3, 6])):
                if await anext(parts, None) is None:
                    break
            await parts.aclose()
        if rng.random() < 0.5:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def half_closed(port: int, case: Case, rng: random.Random) -> None:
    """Say that nothing more comes, then read: the answer is whole and right, or cut."""
    async with Client(port) as client:
        await client.post(case.body)
        client.socket.shutdown(socket.SHUT_WR)
        try:
            status, body = await client.answer()
        except CLOSED:
            return
        if status == 200:
            check(case, body)


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
LAST = HEAD + b"connection: close\r\n"
REFUSED = [  # each with a status that it may get; 0 is a connection closed without one
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (400,)),  # TLS
    (b"GET /none HTTP/9.9\r\n\r\n", (400, 404)),
    (b"POST /v1/completions HTTP/1.1\r\n\r\n", (400,)),  # no host
    (HEAD + b"content-length: -5\r\n\r\n", (400,)),
    (HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}", (400,)),
    (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", (400, 0)),
    (HEAD + b"x: " + b"y" * 100_000 + b"\r\n\r\n", (400, 431)),
    (LAST + b"content-length: 9000000000\r\n\r\n", (413,)),
    (LAST + b"transfer-encoding: chunked\r\n\r\n" + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 30, (413,)),
    *(
        (LAST + b"content-length: %d\r\n\r\n%b" % (len(body), body), (400, 429))  # 429: the queue is full
        for body in (
            b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 50_000, b'{"prompt": NaN}', b'{"prompt": "a", "n": 1e999}',
            b'{"prompt": [99999999]}', b'{"prompt": "a", "max_tokens": 99999999999999999999}', b'{"prompt": "\\ud800"}',
            b'{"prompt": "a", "stop": ["' + b"x" * 40_000 + b'"]}', b'{"prompt": "a", "prompt": 5}',
        )
    ),
]  # fmt: skip


async def malformed(port: int, case: Case, rng: random.Random) -> None:
    said, statuses = rng.choice(REFUSED)
    async with Client(port) as client:
        try:
            await client.write(said)
        except ConnectionError:  # refused before it was said to the end
            return
        answer = await client.end()
    assert answer or 0 in statuses, f"{said!r:.200} was cut off without a word"
    assert not answer or int(answer.split()[1]) in statuses, f"{said!r:.200} got {answer!r:.300}"


async def trickling(port: int, case: Case, rng: random.Random) -> None:
    """A byte now and then, of a header or of a body, or none at all: cut off, or told that it took too long."""
    async with Client(port) as client:
        await client.write(rng.choice([b"", b"P", HEAD, HEAD + b"content-length: 1000\r\n\r\n{"]))
        closed = asyncio.ensure_future(client.end())
        try:
            while not closed.done():
                await asyncio.sleep(0.1)
                try:
                    await client.write(b"x")
                except ConnectionError:
                    break
            answer = await closed
        finally:
            closed.cancel()
    assert not answer or answer.split()[1] in (b"400", b"408"), answer


Kind = Callable[[int, Case, random.Random], Awaitable[None]]
OTHERS: list[Kind] = [honest, honest, half_closed, malformed, malformed, trickling]


async def storm(port: int, cases: list[Case], connections: int, seed: int) -> None:
    """`connections` clients at once: a third leaves, a third is slow, and the rest is of every other kind."""
    rng = random.Random(seed)
    kinds = [(leaving, slow, OTHERS[i // 3 % len(OTHERS)])[i % 3] for i in range(connections)]
    clients = [kind(port, rng.choice(cases), random.Random(rng.random())) for kind in kinds]
    found = await asyncio.gather(*clients, return_exceptions=True)
    errors = [(kind, error) for kind, error in zip(kinds, found, strict=True) if error is not None]
    assert not errors, f"{len(errors)} of {connections} clients: {[(k.__name__, repr(e)) for k, e in errors[:5]]}"
