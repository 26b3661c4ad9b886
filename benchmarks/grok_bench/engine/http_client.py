"""One request to an OpenAI server over HTTP, and the times of its tokens."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .metrics import Record
from .sse import EventStream

if TYPE_CHECKING:
    import aiohttp

Endpoint = Literal["completions", "chat"]
ROUTES: Mapping[Endpoint, str] = {"completions": "completions", "chat": "chat/completions"}


class ServerError(ValueError):
    """The server refused a request, or did not answer it as OpenAI's API says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpJob:
    """A request: text, token ids or chat messages, and how many tokens to generate."""

    prompt: str | list[int] | list[dict[str, Any]]
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and what all requests to it have in common. `base` ends in /v1; `body` goes into each request."""

    base: str
    model: str
    endpoint: Endpoint = "completions"
    body: Mapping[str, Any] = field(default_factory=dict)

    def payload(self, job: HttpJob) -> dict[str, Any]:
        """The body of the request."""
        common = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.endpoint == "completions":
            asked = {"prompt": job.prompt, "max_tokens": job.output_len}
        else:
            said = [{"role": "user", "content": job.prompt}] if isinstance(job.prompt, str) else job.prompt
            asked = {"messages": said, "max_completion_tokens": job.output_len}
        return {**common, **asked, **self.body}


def headers() -> dict[str, str]:
    """The key in OPENAI_API_KEY, where there is one."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


async def served_model(session: aiohttp.ClientSession, base: str) -> str:
    """The first model that the server lists. ServerError where it lists none."""
    async with session.get(f"{base}/models", headers=headers()) as response:
        if response.status != 200:
            raise ServerError(await _refusal(response))
        listed = await response.json(content_type=None)
    try:
        return str(listed["data"][0]["id"])
    except (LookupError, TypeError):
        raise ServerError(f"{base}/models lists no model: {listed!r:.200}") from None


async def send(session: aiohttp.ClientSession, target: Target, job: HttpJob, record: Record, began: float) -> None:
    """Send a request, read its stream to the end, and fill `record`. Times are seconds after `began`, a perf_counter.

    An error of the server or the connection is the record's. The request's time starts when it is sent, so that
    connecting counts; a token's time is that of the chunk that brings it. The server's own count of tokens, where it
    gives one, goes before the number of chunks, as a chunk may hold several.
    """
    import aiohttp

    record.arrival = time.perf_counter() - began
    try:
        url = f"{target.base}/{ROUTES[target.endpoint]}"
        async with session.post(url, json=target.payload(job), headers=headers()) as response:
            if response.status != 200:
                raise ServerError(await _refusal(response))
            await _read(response, record, began)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        name = "" if isinstance(error, ServerError) else f"{type(error).__name__}: "
        record.error = f"{name}{error}".removesuffix(": ")
    record.finished = record.error is None


async def _read(response: aiohttp.ClientResponse, record: Record, began: float) -> None:
    stream, ended = EventStream(), False
    async for piece in response.content.iter_any():
        now = time.perf_counter() - began
        for event in stream.feed(piece):
            if event == "[DONE]":
                ended = True
                continue
            chunk = json.loads(event)
            if error := chunk.get("error"):
                raise ServerError(error.get("message") or str(error) if isinstance(error, dict) else str(error))
            for choice in chunk.get("choices") or ():
                ended = ended or choice.get("finish_reason") is not None
                if choice.get("finish_reason") == "error":
                    raise ServerError("the request ended with finish_reason 'error'")
                if _brings_token(choice):
                    record.times.append(now)
            if usage := chunk.get("usage"):
                record.input_tokens = usage.get("prompt_tokens") or 0
                record.counted = usage.get("completion_tokens")
    if not ended:
        raise ServerError(f"the stream ended without a finish_reason, after {len(record.times)} chunks")
    if not record.times:
        raise ServerError("the stream ended without a token")


def _brings_token(choice: Mapping[str, Any]) -> bool:
    """Whether a chunk brings a token. One without text does (half of a character), unless it only opens a message with
    its role, or only closes it with the finish_reason."""
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or choice.get("finish_reason") is None
    if any(value for name, value in delta.items() if name != "role"):
        return True
    return "role" not in delta and choice.get("finish_reason") is None


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """The status and the server's message, of OpenAI's shape or any other."""
    text = await response.text(errors="replace")
    try:
        text = json.loads(text)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        text = text[:200]
    return f"{response.status} {response.reason}: {text}"
