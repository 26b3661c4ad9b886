"""An OpenAI server that says scripted chunks after scripted delays, so that what a client measures is known."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Script:
    """What the server does with each request: the chunks of its stream, each after a delay in seconds."""

    chunks: Sequence[tuple[float, Any]]  # a dict goes out as JSON, a str as it is, None ends the connection
    status: int = 200
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0


def text(value: str, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "finish_reason": None, **choice}]}


def delta(**choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": choice, "finish_reason": None}]}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def stream(first: float, gap: float, tokens: int) -> list[tuple[float, Any]]:
    """`tokens` chunks: the first after `first` seconds, then one every `gap`, and the usage."""
    said = [(first, text(" a")), *((gap, text(" b")) for _ in range(tokens - 1))]
    return [*said, (0.0, text("", finish_reason="length")), (0.0, usage(7, tokens))]


@contextlib.contextmanager
def serving(script: Script) -> Iterator[str]:
    """Serve `script` on a thread of its own; gives the address."""
    at_once = 0

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "scripted"}]})

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal at_once
        script.seen.append(await request.json())
        script.headers.append(dict(request.headers))
        if script.status != 200:
            return web.json_response({"error": {"message": "scripted refusal"}}, status=script.status)
        at_once += 1
        script.most_at_once = max(script.most_at_once, at_once)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        due = loop.time()
        for delay, chunk in script.chunks:
            due += delay
            await asyncio.sleep(max(due - loop.time(), 0.0))
            if chunk is None:
                assert request.transport is not None
                request.transport.close()
                break
            said = chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            await response.write(said.encode())
        else:
            await response.write(b"data: [DONE]\n\n")
        at_once -= 1
        return response

    started, loop = threading.Event(), asyncio.new_event_loop()
    port = 0

    async def start() -> web.AppRunner:
        nonlocal port
        app = web.Application()
        app.router.add_get("/v1/models", models)
        app.router.add_get("/health", models)
        app.router.add_post("/v1/completions", answer)
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        return runner

    def run() -> None:
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
