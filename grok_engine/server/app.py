"""The ASGI app: its routes, and what surrounds each of them."""

from __future__ import annotations

import hmac
import logging
import re
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grok_engine import AsyncLLM

from .chat import ChatCompletions
from .completions import Completions
from .errors import ApiError, ClientLeftError, as_api_error
from .limits import Limits
from .metrics import Metrics
from .models import Detokenize, Health, Models, Tokenize, version
from .page import Page
from .service import Service
from .streams import reply

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

logger = logging.getLogger(__name__)
_OPEN = ("/", "/health", "/version", "/metrics")  # need no key


def create_app(
    llm: AsyncLLM,
    *,
    served_model_name: str | Sequence[str] | None = None,
    api_key: str | Sequence[str] | None = None,
    chat_template: str | None = None,
    metrics_registry: CollectorRegistry | None = None,
    limits: Limits | None = None,
    page: bool = True,
) -> Starlette:
    """An app that serves one model by OpenAI's API, on the event loop that runs it. It may be mounted under a prefix,
    needs no lifespan, and closes nothing: `llm` stays its caller's.

    served_model_name: what clients call the model, by default the name in its configuration; the first of several is
    the one in answers. api_key: one or several, any of which clients must send as `Authorization: Bearer KEY`, but for
    `/`, `/health`, `/version` and `/metrics`. chat_template: Jinja, or the name of one of the model's templates, in
    place of the one that its files name. metrics_registry: where counters go, by default one of the app's own;
    `app.state.metrics.close()`, or the end of the app's lifespan, takes them out. page: whether there is one at `/`.
    """
    names = (served_model_name,) if isinstance(served_model_name, str) else tuple(served_model_name or ())
    keys = (api_key,) if isinstance(api_key, str) else tuple(api_key or ())
    if not all(names) or not all(keys):
        raise ValueError(f"served_model_name={names!r}, {len(keys)} keys: expected none that is empty")
    service = Service(
        llm=llm, names=names or (llm.engine.config.model.name,), limits=limits or Limits(), chat_template=chat_template
    )
    models, health = Models(service), Health(service)
    metrics = Metrics(llm, service.names[0], metrics_registry)
    routes = [
        *(Page(service).routes() if page else ()),
        Route("/metrics", metrics.route),
        Route("/health", health.get),
        Route("/version", version),
        Route("/v1/models", models.get),
        Route("/v1/models/{name:path}", models.get_one),
        Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
        Route("/v1/completions", Completions(service), methods=["POST"]),
        Route("/tokenize", Tokenize(service), methods=["POST"]),
        Route("/detokenize", Detokenize(service), methods=["POST"]),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        metrics.open()
        yield
        metrics.close()

    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, keys=tuple(key.encode() for key in keys), metrics=metrics)],
        exception_handlers={404: _refuse, 405: _refuse, ApiError: _refuse},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # to the scheme and the host that a proxy speaks to us by
    app.state.metrics = metrics
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    told = request.scope["state"]["error"] = as_api_error(error)
    if told.status == 404 and told.code is None:
        told.message = f"no route {request.url.path!r:.200}"
    elif told.status == 405:
        methods = ", ".join(sorted(told.headers["Allow"].split(", ")))
        told.message = f"{request.method} {request.url.path!r:.200}: expected {methods}"
    return Response(told.body(), told.status, told.headers, media_type="application/json")


class Gate:
    """Around each request: an id, which answers and logs have; the key; an answer for every exception, and a count."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[bytes], metrics: Metrics) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def forward(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_key(scope, headers)
            await self._app(scope, receive, forward)
        except ClientLeftError:
            status = 499
        except Exception as error:
            told = scope["state"]["error"] = as_api_error(error)
            if told.status >= 500 and told.code is None:
                logger.exception("request %s failed", request_id)
            if status:  # nothing can be said any more; the server closes the connection
                raise
            await reply(forward, told.body(), told.status, [(k.encode(), v.encode()) for k, v in told.headers.items()])
        finally:
            if status == 499:
                self._metrics.error("client_left", status)
            elif (failed := scope["state"].pop("error", None)) is not None:
                self._metrics.error(failed.code or failed.kind, failed.status)
            logger.info(
                "%s %s %s %d %.0f ms",
                request_id, scope["method"], urllib.parse.quote(scope["path"]), status,
                (time.monotonic() - began) * 1000,
            )  # fmt: skip

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys or scope["path"].removeprefix(scope.get("root_path", "")) in _OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        found = given.strip().encode("latin-1")  # as headers are decoded
        if scheme.lower() != "bearer" or not any(hmac.compare_digest(found, key) for key in self._keys):
            raise ApiError(
                401, "wrong or missing API key: expected the header `Authorization: Bearer KEY`",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
