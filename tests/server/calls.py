"""Requests to an app within the process, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from starlette.types import ASGIApp

from grok_engine import AsyncLLM

LIMIT = 60.0
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{{ closing }}"
)


def ask(app: ASGIApp, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
    """One request. body: JSON, or bytes as they are."""
    if isinstance(body, bytes):
        headers = {"content-type": "application/json", **options.get("headers", {})}
        options = {**options, "headers": headers, "content": body}
    elif body is not None:
        options["json"] = body

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return run(request())


def post(app: ASGIApp, path: str, body: Any, **options: Any) -> Any:
    """The JSON of an answer, which must be one."""
    response = ask(app, "POST", path, body, **options)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(app: ASGIApp, path: str, body: Any, status: int = 400, **options: Any) -> dict[str, Any]:
    """The error of an answer, which must have this status and OpenAI's form."""
    response = ask(app, "POST", path, body, **options)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def data_of(stream: str) -> list[str]:
    """The data of server-sent events, without the comments of a slow stream."""
    return [line.removeprefix("data: ") for line in stream.split("\n\n") if line and not line.startswith(":")]


def events(app: ASGIApp, path: str, body: Any) -> list[dict[str, Any]]:
    """The events of a stream, which must end well."""
    response = ask(app, "POST", path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *found, last = data_of(response.text)
    assert last == "[DONE]"
    return [json.loads(line) for line in found]


def run(work: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, LIMIT)

    return asyncio.run(bounded())


async def idle(llm: AsyncLLM) -> None:
    while llm.stats().requests:
        await asyncio.sleep(0.001)


class Exchange:
    """One request whose receiving and sending the test steers, as an ASGI server would."""

    def __init__(self, app: ASGIApp, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        self._app, self.sent = app, list[dict[str, Any]]()
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": False})
        self.scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": "",
            "query_string": b"", "scheme": "http", "http_version": "1.1",
            "headers": [
                (k.encode(), v.encode()) for k, v in {"content-type": "application/json", **(headers or {})}.items()
            ],
        }  # fmt: skip
        self.on_send: Callable[[dict[str, Any]], Awaitable[None]] | None = None

    def more(self, data: bytes | None = None) -> None:
        """Another part of the body; without data, one that does not come."""
        self._incoming._queue[0]["more_body"] = True  # type: ignore[attr-defined]
        if data is not None:
            self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": False})

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def run(self) -> None:
        async def send(message: Any) -> None:
            self.sent.append(message)
            if self.on_send is not None:
                await self.on_send(message)

        await self._app(self.scope, self._incoming.get, send)  # type: ignore[arg-type]

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()
