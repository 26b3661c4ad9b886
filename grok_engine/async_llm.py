"""AsyncLLM: the engine inside an asyncio program. Steps run on one thread of their own; the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from .engine import EngineClosedError, LLMEngine, Prompt
from .runtime.request import RequestOutput
from .sampling.params import SamplingParams


class AsyncLLM:
    """Many concurrent `generate` calls over one engine, which it owns. Use it from one event loop.

    Requests and aborts are handed over between steps and on the steps' thread: the engine is never touched by another,
    and a long prompt or a grammar does not hold the event loop up either.
    Every consumer has a queue of its own: a slow one blocks nobody. A step that raises ends every waiting consumer
    with that error and leaves the engine closed.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        self._queues: dict[str, asyncio.Queue[RequestOutput | BaseException]] = {}
        self._aborts: set[str] = set()  # and these two wait for the end of the step under way
        self._new: dict[str, tuple[Prompt, SamplingParams, int]] = {}
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
    ) -> AsyncGenerator[RequestOutput, None]:
        """The request's outputs as its tokens come. Leaving the loop, or cancellation, aborts it and frees its pages."""
        if self._error is not None:
            raise EngineClosedError("the engine is closed") from self._error
        request_id = f"async-{next(self._ids)}" if request_id is None else request_id
        if request_id in self._queues:
            raise ValueError(f"request_id={request_id!r} is in use")
        queue: asyncio.Queue[RequestOutput | BaseException] = asyncio.Queue()
        self._queues[request_id] = queue
        self._new[request_id] = (prompt, SamplingParams() if sampling_params is None else sampling_params, priority)
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
            if not finished and self._new.pop(request_id, None) is None:
                self._aborts.add(request_id)
                self._wake()

    def _wake(self) -> None:
        if self._stepper is None or self._stepper.done():
            self._stepper = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Steps until there is nothing left to do."""
        loop = asyncio.get_running_loop()
        busy = True
        try:
            while self._error is None and (busy or self._new or self._aborts):
                new, self._new = self._new, {}
                aborts, self._aborts = self._aborts, set()
                results, busy = await loop.run_in_executor(self._thread, self._step, new, aborts)
                for request_id, result in results:  # not to one who has since come with the id of one who left
                    if request_id in self._queues and request_id not in self._aborts:
                        self._queues[request_id].put_nowait(result)
        except Exception as error:
            self._fail(error)

    def _step(
        self, new: dict[str, tuple[Prompt, SamplingParams, int]], aborts: set[str]
    ) -> tuple[list[tuple[str, RequestOutput | Exception]], bool]:
        """On the thread: give the engine what came in, and step. What each request gets, and whether there is more."""
        results: list[tuple[str, RequestOutput | Exception]] = []
        self.engine.discard_request(aborts)
        for request_id, request in new.items():
            prompt, params, priority = request
            try:
                self.engine.add_request(request_id, prompt, params, priority)
            except Exception as error:  # whatever is wrong with it, the others do not notice
                results.append((request_id, error))
        results += [(output.request_id, output) for output in self.engine.step()]
        return results, self.engine.has_unfinished_requests()

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
        self._thread.shutdown()
        self._fail(self._error)
