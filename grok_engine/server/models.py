"""What is served, whether it works, and its tokenizer: all but the routes that generate."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from grok_engine import __version__

from .errors import ApiError, refusals
from .limits import decode, read_body
from .params import chat_options
from .protocol import DetokenizeRequest, TokenizeRequest
from .service import Service
from .streams import encode, reply, run

_Request = TypeVar("_Request", bound=msgspec.Struct)


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")


async def version(request: Request) -> Response:
    return _json({"version": __version__})


class Health:
    """200 while requests are taken: load balancers ask."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def get(self, request: Request) -> Response:
        llm = self.service.llm
        if llm.closed or llm.draining:
            raise ApiError(503, "the engine is closed" if llm.closed else "the engine is draining", code="unavailable")
        llm.stats()  # EngineAsleepError
        return Response()


class Models:
    """/v1/models, with each name that clients may use."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def _card(self, name: str) -> dict[str, Any]:
        service = self.service
        return {
            "id": name, "object": "model", "created": service.created, "owned_by": "grok-engine",
            "root": service.names[0], "parent": None, "max_model_len": service.llm.engine.config.max_len,
        }  # fmt: skip

    async def get(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._card(name) for name in self.service.names]})

    async def get_one(self, request: Request) -> Response:
        return _json(self._card(self.service.check_model(request.path_params["name"])))


class _Call(Generic[_Request]):
    """An ASGI application that computes its answer at once."""

    kind: type[_Request]

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, self.service.limits)
        await reply(send, await run(len(body) <= self.service.limits.inline_bytes, self._answer, body))

    def _answer(self, body: bytes) -> bytes:
        request = decode(body, self.kind)
        with refusals(self.kind.__struct_fields__):
            return encode(self.answer(request))

    def answer(self, request: _Request) -> dict[str, Any]:
        raise NotImplementedError


class Tokenize(_Call[TokenizeRequest]):
    """Token ids of a text, with BOS and EOS as for completions, or of a conversation."""

    kind = TokenizeRequest

    def answer(self, request: TokenizeRequest) -> dict[str, Any]:
        llm = self.service.llm
        self.service.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise ApiError(400, "expected one of prompt and messages", param="prompt")
        if request.messages is not None:
            options = chat_options(request, self.service.chat_template)
            ids = llm.apply_chat_template(request.messages, **options, tools=request.tools)
        else:
            add = request.add_special_tokens is not False
            ids = llm.encode(request.prompt, add_special_tokens=add) if request.prompt else []
        spelled = None
        if request.return_token_strs:
            assert llm.tokenizer is not None
            surfaces = (llm.tokenizer.surface(token, False) for token in ids)
            spelled = [surface.text + surface.data.decode(errors="replace") for surface in surfaces]
        return {
            "count": len(ids), "max_model_len": llm.engine.config.max_len, "tokens": ids, "token_strs": spelled,
        }  # fmt: skip


class Detokenize(_Call[DetokenizeRequest]):
    """The text of token ids; control tokens have none."""

    kind = DetokenizeRequest

    def answer(self, request: DetokenizeRequest) -> dict[str, Any]:
        self.service.check_model(request.model)
        if (tokenizer := self.service.llm.tokenizer) is None:
            raise ValueError("tokens have no text: the model has no tokenizer")
        return {"prompt": tokenizer.decode(request.tokens)}
