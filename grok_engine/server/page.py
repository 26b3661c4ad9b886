"""The page at `/`, to talk to the model and to watch its engine; and `/stats`, the numbers that the page shows."""

from __future__ import annotations

import time
from functools import cached_property
from importlib.resources import files
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from grok_engine import EngineAsleepError, EngineClosedError

from .service import Service

# One file with its style and its script: a browser loads nothing else, and talks to nobody but this server.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
_HEADERS = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


class Page:
    """The page of one app."""

    def __init__(self, service: Service) -> None:
        self._llm, self._service = service.llm, service
        self._html = files(__package__).joinpath("page.html").read_bytes()

    def routes(self) -> list[Route]:
        return [Route("/", self.html), Route("/stats", self.stats)]

    async def html(self, request: Request) -> Response:
        return Response(self._html, media_type="text/html", headers=_HEADERS)

    async def stats(self, request: Request) -> Response:
        return Response(msgspec.json.encode(self.numbers()), media_type="application/json")

    def numbers(self) -> dict[str, Any]:
        """What `/stats` gives: the engine now, and its counts since the start. seconds: a clock to divide them by.

        pages: `free` has the cached ones among it. expert_load: [layer][expert], or null. Of an engine that is asleep
        or closed, `state` alone.
        """
        found: dict[str, Any] = {"model": self._service.names[0], "state": "running", "seconds": time.monotonic()}
        try:
            stats = self._llm.stats()
        except (EngineAsleepError, EngineClosedError) as error:
            return {**found, "state": "asleep" if isinstance(error, EngineAsleepError) else "closed"}
        s = stats.scheduler
        return {
            **found, "chat": self._chats, "running": s.running, "waiting": s.waiting,
            "max_running": self._llm.engine.config.max_num_seqs,
            "pages": {
                "used": s.pages_used, "free": s.pages_free, "cached": s.pages_cached,
                "tokens": self._llm.engine.config.page_size,
            },
            "kv_bytes": stats.kv_bytes, "steps": stats.steps, "preemptions": s.preemptions, "finished": stats.finished,
            "prompt_tokens": stats.prompt_tokens, "generated_tokens": stats.generated_tokens,
            "prefix_tokens": {"queried": s.query_tokens, "found": s.hit_tokens}, "expert_load": stats.expert_load,
        }  # fmt: skip

    @cached_property
    def _chats(self) -> bool:
        """Whether the model has a template for conversations; one without continues texts."""
        try:
            self._llm.apply_chat_template([{"role": "user", "content": "x"}], chat_template=self._service.chat_template)
        except ValueError:
            return False
        return True
