"""The model that an app serves, and how a request for it becomes streams of outputs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Generic, TypeVar

from starlette.types import Receive, Scope, Send

from grok_engine import AsyncLLM, OutputStream, Prompt, SamplingParams

from .errors import RETRY_AFTER, ApiError, refusals
from .limits import Limits, decode, read_body
from .protocol import GenerationRequest
from .streams import View, answer_events, answer_whole, run

AT_ONCE = 4  # requests that one turn of the event loop reads and queues
_Request = TypeVar("_Request", bound=GenerationRequest)


@dataclass(frozen=True, kw_only=True)
class Service:
    """names: what clients may call the model; the first is what answers call it where a request names none.
    chat_template: in place of the model's."""

    llm: AsyncLLM
    names: tuple[str, ...]
    limits: Limits
    chat_template: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _serial: count[int] = field(default_factory=count)

    def check_model(self, name: str | None) -> str:
        """The model's name for the answer. ApiError 404 for a model that is not here."""
        if name is not None and name not in self.names:
            expected = " or ".join(map(repr, self.names))
            raise ApiError(404, f"model {name!r:.200} is not served: expected {expected}", code="model_not_found",
                           param="model")  # fmt: skip
        return name or self.names[0]

    def submit(self, prompts: Sequence[Prompt], params: SamplingParams, priority: int, name: str) -> list[OutputStream]:
        """Queue all prompts of one request, or none of them. Slow for long texts and for grammars."""
        streams: list[OutputStream] = []
        for at, prompt in enumerate(prompts):
            # The engine's ids are unique; a client may use its own again.
            request_id = f"{name}/{next(self._serial)}"
            try:
                streams.append(
                    self.llm.generate(
                        prompt, params, request_id, priority=priority, timeout=self.limits.request_seconds
                    )
                )
            except BaseException as error:
                streams.clear()  # which aborts them
                if len(prompts) > 1 and isinstance(error, ValueError):
                    raise ValueError(f"prompt[{at}]: {error}") from error
                raise
        return streams

    def aborted(self, began: float) -> ApiError:
        """Why a request that came at `began` was aborted, where its client has not left."""
        seconds = self.limits.request_seconds
        if seconds is not None and time.monotonic() - began >= seconds:
            # The same request would take as long again.
            return ApiError(504, f"the request was aborted after {seconds:g} s", code="timeout",
                            headers={"x-should-retry": "false"})  # fmt: skip
        reason = "the engine is draining" if self.llm.draining else "the request was aborted"
        return ApiError(503, reason, code="unavailable", headers={"Retry-After": RETRY_AFTER})


@dataclass(frozen=True)
class Job(Generic[_Request]):
    """A request that is understood. view: how its client sees the outputs. explain: as `refusals` takes it."""

    request: _Request
    prompts: Sequence[Prompt]
    params: SamplingParams
    view: View
    explain: Callable[[str], str]


class Endpoint(Generic[_Request]):
    """An ASGI application for one kind of request that generates."""

    kind: type[_Request]

    def __init__(self, service: Service) -> None:
        self.service = service
        self._turns: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    def prepare(self, request: _Request) -> Job[_Request]:
        """ValueError or ApiError for a request that is wrong."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self.service.limits
        body = await read_body(scope, receive, limits)
        await self._take_turn()
        inline = len(body) <= limits.inline_bytes
        job = await run(inline, self._read, body)
        aborted = partial(self.service.aborted, time.monotonic())
        inline = inline and len(job.prompts) * job.params.n <= limits.inline_answers
        # A grammar is compiled at once there, so that an error in it comes before the status 200 of a stream.
        inline = inline and job.params.structured is None
        streams = await run(inline, self._submit, job, scope["state"]["request_id"])
        if job.request.stream:
            await answer_events(receive, send, streams, job.view, aborted, limits.keep_alive_seconds)
        else:
            await answer_whole(receive, send, streams, job.view, aborted)

    async def _take_turn(self) -> None:
        """Let a few requests in at each turn of the event loop: many at once would hold up the streams that run."""
        loop = asyncio.get_running_loop()
        if self._turns is None or self._turns[0] is not loop:
            self._turns = loop, asyncio.Semaphore(AT_ONCE)
        async with self._turns[1]:
            await asyncio.sleep(0)

    def _read(self, body: bytes) -> Job[_Request]:
        request = decode(body, self.kind)
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options")
        if request.stream and request.prompt_logprobs is not None:
            raise ApiError(
                400, f"prompt_logprobs={request.prompt_logprobs} needs stream=false", param="prompt_logprobs"
            )
        with refusals(self.kind.__struct_fields__):
            job = self.prepare(request)
            prompts, n, most = len(job.prompts), job.params.n, self.service.limits.max_answers
            if prompts > 1 and prompts * n > most:  # the engine limits n
                raise ValueError(f"prompt has {prompts} prompts, times n={n}: expected at most {most} answers")
            return job

    def _submit(self, job: Job[_Request], request_id: str) -> list[OutputStream]:
        with refusals(self.kind.__struct_fields__, job.explain):
            return self.service.submit(job.prompts, job.params, job.request.priority or 0, request_id)
