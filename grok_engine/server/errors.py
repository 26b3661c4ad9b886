"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, with the status of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import msgspec
from starlette.exceptions import HTTPException

from grok_engine import EngineAsleepError, EngineClosedError, QueueFullError

RETRY_AFTER = "1"  # seconds


class ApiError(Exception):
    """What a client is told. `param` names the field of the request that is wrong."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's type of the error."""
        if self.status >= 500:
            return "server_error"
        return "rate_limit_error" if self.status == 429 else "invalid_request_error"

    def body(self) -> bytes:
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
        )


class ClientLeftError(Exception):
    """The client closed its connection: nobody reads an answer. Logged as status 499."""


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of an exception: of one that nothing here foresaw, only that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):  # of the router
        return ApiError(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": RETRY_AFTER})
    if isinstance(error, (EngineClosedError, EngineAsleepError)):
        return ApiError(503, str(error), code="unavailable", headers={"Retry-After": RETRY_AFTER})
    if isinstance(error, ImportError):  # an extra that is not installed
        return ApiError(501, str(error))
    return ApiError(500, "internal error: the server's log has it under the id of this request")


@contextmanager
def refusals(fields: Collection[str], explain: Callable[[str], str] = str) -> Iterator[None]:
    """A ValueError raised inside is the request's fault: status 400, and the field that its message begins with is the
    error's param. explain: makes a message about fields of the request of one about parameters of the engine."""
    try:
        yield
    except ValueError as error:
        message = explain(str(error))
        first = re.match(r"\w*", message)
        raise ApiError(400, message, param=first[0] if first and first[0] in fields else None) from error


def rename(message: str, names: Mapping[str, str]) -> str:
    """A message that begins with one of these names of the engine, with the request's own in its place."""
    found = re.match(r"(structured)\.\w+|token id|\w+", message)
    name = names.get(found[1] or found[0]) if found else None
    return message if found is None or name is None else name + message[found.end() :]
