"""AsyncLLM: the engine in an asyncio program. Steps run on a thread of their own, so the event loop stays free."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .config import as_float, shown
from .engine import LLMEngine
from .runtime.builder import Prompt
from .runtime.mailbox import OutputStream
from .runtime.stats import EngineStats
from .sampling.params import RequestOutputKind, SamplingParams
from .stepping import Stepper
from .tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .tokenizer.chat import ChatOptions, Message

_CLOSED, _DRAINING = "the engine is closed", "the engine is draining: expected no new request"


class AsyncLLM:
    """Many concurrent `generate` calls over one engine, which it owns, from any threads and event loops.

    A thread steps the engine. It starts when there is work and ends when there is none. Each consumer has a mailbox of
    bounded size, so a slow one costs nobody else anything. A consumer whose event loop is closed counts as gone: its
    request is aborted. When the program ends, so do its requests.

    Every consumer gets an answer or an error. A step that fails ends its requests with finish_reason "error", and later
    requests are served; once the engine itself is closed, consumers get EngineClosedError.
    """

    def __init__(self, engine: LLMEngine) -> None:
        if not isinstance(engine, LLMEngine):
            raise TypeError(f"engine={shown(engine)}: expected an LLMEngine, as in AsyncLLM(LLMEngine('tiny'))")
        self.engine = engine
        self._stepper = Stepper(engine)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; without one, prompts and outputs are token ids."""
        return self.engine.tokenizer

    @property
    def closed(self) -> bool:
        """Whether the engine is closed: by `close`, or because the device was damaged."""
        return self.engine.closed

    @property
    def draining(self) -> bool:
        """Whether new requests are refused, by `drain` or `close`."""
        return self._stepper.refusal is not None

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a prompt, as `LLMEngine.encode` gives them."""
        return self.engine.encode(prompt, add_special_tokens=add_special_tokens)

    def get_default_sampling_params(self) -> SamplingParams:
        """How requests without SamplingParams sample: as the model's files say, else by the defaults of the class."""
        return self.engine.default_sampling_params

    def apply_chat_template(self, messages: Sequence[Message], **options: Unpack[ChatOptions]) -> list[int]:
        """Token ids of a conversation. The options and the errors are those of `LLM.chat`."""
        return self.engine.apply_chat_template(messages, **options)

    def stats(self) -> EngineStats:
        """Counts now and since the start."""
        return self.engine.stats()

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> OutputStream:
        """Queue a request, at this call. Returns its outputs, for `async for`; leaving them aborts the request.

        A consumer that is slower than the engine gets the newest output (CUMULATIVE), or all that it missed in one
        (DELTA). `timeout` seconds after the call the request ends with what it has and finish_reason "abort".

        Raises what `LLMEngine.add_request` does, and EngineClosedError while draining. In an event loop, a grammar is
        compiled on another thread, and an error in it is raised where the stream is first awaited. Encoding a long
        text takes time here: `await asyncio.to_thread(llm.generate, ...)` does that, and compiles, off the event loop.
        """
        seconds = math.inf if timeout is None else as_float(timeout)
        if seconds is None or not seconds > 0:
            raise ValueError(f"timeout={shown(timeout)} is not a positive number of seconds, or None")
        mailbox = self._stepper.register(request_id, time.monotonic() + seconds)
        try:
            request = self.engine.prepare(mailbox.key, prompt, sampling_params, priority)
            mailbox.delta = request.params.output_kind is RequestOutputKind.DELTA
            if request.params.structured is None or mailbox.loop is None:
                self._stepper.submit(mailbox, request)
            else:
                self._stepper.submit_later(mailbox, request)
        except BaseException:
            self._stepper.forget([mailbox])
            raise
        return OutputStream(mailbox, self.engine.abort_request)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> OutputStream:
        """`generate` for a conversation, with the options of `LLM.chat`."""
        prompt = self.apply_chat_template(messages, **options)
        return self.generate(prompt, sampling_params, request_id, priority=priority, timeout=timeout)

    def abort(self, request_id: str) -> None:
        """End a request: its stream ends with what it has and finish_reason "abort". Unknown ids are ignored."""
        self._stepper.abort(self._stepper.find(request_id))

    async def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and finish those that run or wait; after `timeout` seconds, abort what is left of them.

        Returns whether none had to be aborted. `wake_up` lets requests in again.
        """
        seconds = None if timeout is None else as_float(timeout)
        if timeout is not None and (seconds is None or not seconds >= 0):
            raise ValueError(f"timeout={shown(timeout)} is not a number of seconds, or None")
        self._stepper.refusal = self._stepper.refusal or _DRAINING
        idle = asyncio.wrap_future(self._stepper.idle())
        finished, _ = await asyncio.wait([idle], timeout=seconds)
        if not finished:
            self._stepper.abort(self._stepper.all())
            await idle
        return bool(finished)

    async def sleep(self) -> None:
        """`LLMEngine.sleep`, off the event loop: EngineBusyError while requests are unfinished."""
        await self._call(self.engine.sleep)

    async def wake_up(self) -> None:
        """`LLMEngine.wake_up`, off the event loop. Lets requests in again after `drain`."""
        await self._call(self.engine.wake_up)
        if self._stepper.refusal == _DRAINING:
            self._stepper.refusal = None

    async def close(self) -> None:
        """End every request with EngineClosedError and free what the engine holds. A second call does nothing."""
        self._stepper.refusal = _CLOSED
        await self._call(self._stepper.close)
        for thread in self._stepper.threads():
            thread.join()  # at its last statement

    async def _call(self, function: Callable[[], None]) -> None:
        await asyncio.wrap_future(self._stepper.call(function))

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()
