"""What one request may cost the server, and how its body is read within that."""

from __future__ import annotations

import asyncio
import difflib
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope

from .errors import ApiError, ClientLeftError
from .protocol import IGNORED, INERT

_Request = TypeVar("_Request", bound=msgspec.Struct)
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """max_body_bytes, body_seconds: of a request's body, and for it to arrive. max_answers: to one request, its prompts
    times `n`. inline_bytes, inline_answers: what asks for more is read, encoded and queued off the event loop.
    request_seconds: after them a request is aborted, with status 504 or an error in its stream. keep_alive_seconds: a
    stream that is silent for so long sends a comment.
    """

    max_body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    max_answers: int = 512
    inline_bytes: int = 8192
    inline_answers: int = 16
    request_seconds: float | None = None
    keep_alive_seconds: float = 15.0


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The body of a JSON request. ApiError for another type, for too large a one, and for one that takes too long."""
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # browsers let a page of any origin send other types, or none
        raise ApiError(415, f"content-type {kind!r:.80}: expected application/json")
    size = headers.get("content-length", "0")
    if size.isdecimal() and int(size) > limits.max_body_bytes:
        raise ApiError(413, f"the body has {size} bytes, more than {limits.max_body_bytes}")
    try:
        return await asyncio.wait_for(_read(receive, limits.max_body_bytes), limits.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_seconds:g} s") from None


async def _read(receive: Receive, most: int) -> bytes:
    body, more = b"", True
    parts: list[bytes] = []
    size = 0
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        body, more = message.get("body", b""), message.get("more_body", False)
        size += len(body)
        if size > most:
            raise ApiError(413, f"the body has more than {most} bytes")
        parts.append(body)
    return body if len(parts) == 1 else b"".join(parts)


def decode(body: bytes, kind: type[_Request]) -> _Request:
    """The request in a body. ApiError names the field and the value that is wrong; unknown fields are refused."""
    try:
        given = _FIELDS.decode(body)
        known = kind.__struct_fields__
        for name, value in given.items():
            if name not in known and name not in IGNORED:
                _check_inert(name, msgspec.json.decode(value), known)
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), body) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def _check_inert(name: str, value: Any, known: tuple[str, ...]) -> None:
    if name not in INERT:
        near = difflib.get_close_matches(name[:80], known, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ApiError(400, f"unknown field {name!r:.80}{hint}", param=name[:80], code="unknown_field")
    if value is not None and value not in INERT[name]:
        expected = " or ".join(["null", *(msgspec.json.encode(v).decode() for v in INERT[name])])
        raise ApiError(400, f"{name}={value!r:.80} is not supported: expected {expected}", param=name)


def _explained(message: str, body: bytes) -> ApiError:
    """msgspec's message, with the value that it is about: "Expected `int | null`, got `str` - at `$.n`"."""
    found = re.fullmatch(r"(.*) - at (?:`key` in )?`\$(.*)`", message)
    if found is None:
        missing = re.search(r"required field `(\w+)`", message)
        what = message[:1].lower() + message[1:].replace("`", "")
        return ApiError(400, f"the body: {what}", param=missing[1] if missing else None)
    what, path = found[1].replace("`", ""), found[2].lstrip(".")
    shown = path
    with suppress(msgspec.MsgspecError, LookupError, TypeError):  # `[...]`: msgspec does not say which
        value = msgspec.json.decode(body)
        for key, index in re.findall(r"(\w+)|\[(\d+)\]", path):
            value = value[key] if key else value[int(index)]
        shown = f"{path}={value!r:.200}"
    return ApiError(400, f"{shown}: {what[:1].lower()}{what[1:]}", param=re.split(r"\W", path)[0])
