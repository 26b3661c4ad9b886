"""AsyncLLM: the engine inside an asyncio program. Steps run on one thread of their own; the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from .engine import EngineClosedError, LLMEngine, Prompt
from .request import RequestOutput
from .sampling import SamplingParams


class AsyncLLM:
    """Many concurrent `generate` calls over one engine, which it owns. Use it from one event loop.

    Requests and aborts are handed over between steps, so that the engine is only ever touched by one thread at a time.
    Every consumer has a queue of its own: a slow one blocks nobody. A step that raises ends every waiting consumer
    with that error and leaves the engine closed.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._queues: dict[str, asyncio.Queue[RequestOutput | BaseException]] = {}
        self._aborts: list[str] = []
        self._new: list[tuple[str, Prompt, SamplingParams, int]] = []
        self._stepper: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grok-engine")
        self._ids = count()
        self._error: BaseException | None = None

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """The request's outputs as its tokens come. Leaving the loop, or cancellation, aborts it and frees its pages."""
        if self._error is not None:
            raise EngineClosedError("the engine is closed") from self._error
        request_id = f"async-{next(self._ids)}" if request_id is None else request_id
        if request_id in self._queues:
            raise ValueError(f"request_id={request_id!r} is in use")
        queue: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()
        self._queues[request_id] = queue
        self._new.append((request_id, prompt, sampling_params or SamplingParams(), priority))
        self._wake()
        finished = False
        try:
            while not finished:
                output = await queue.get()
                if isinstance(output, BaseException):
                    finished = True
                    raise output
                finished = output.finished
                yield output
        finally:
            del self._queues[request_id]
            if not finished:
                self._aborts.append(request_id)
                self._wake()

    def _wake(self) -> None:
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Steps until there is nothing left to do."""
        loop = asyncio.get_running_loop()
        try:
            while self._error is None and (self._hand_over() or self.engine.has_unfinished_requests()):
                for output in await loop.run_in_executor(self._thread, self.engine.step):
                    if output.request_id in self._queues:
                        self._queues[output.request_id].put_nowait(output)
        except Exception as error:
            self._fail(error)

    def _hand_over(self) -> bool:
        """Give the engine what came in since the last step. Whether there was anything."""
        new, self._new = self._new, []
        aborts, self._aborts = self._aborts, []
        for request_id, prompt, params, priority in new:
            if request_id not in self._queues:
                continue  # its consumer has left already
            try:
                self.engine.add_request(request_id, prompt, params, priority)
            except ValueError as error:
                self._queues[request_id].put_nowait(error)
        self.engine.discard_request(aborts)
        return bool(new or aborts)

    def _fail(self, error: BaseException) -> None:
        self._error = error
        for queue in self._queues.values():
            queue.put_nowait(error)
        self.engine.close()

    async def close(self) -> None:
        """End every request with EngineClosedError and free what the engine holds. A second call does nothing."""
        if self._error is None:
            self._error = EngineClosedError("the engine was closed")
        if self._stepper is not None:  # the step under way ends before anything is freed
            await asyncio.gather(self._stepper, return_exceptions=True)
        self._fail(self._error)
        self._thread.shutdown()
