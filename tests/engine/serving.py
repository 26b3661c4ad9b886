"""What the tests of AsyncLLM share: a small engine with known continuations, and a check of what is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from grok_engine import AsyncLLM, LLMEngine, RequestOutput, SamplingParams

FOLDER = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"
with np.load(FOLDER / "golden.npz") as _arrays:
    PROMPTS: list[list[int]] = [_arrays[f"p{i}_tokens"].tolist() for i in range(3)]
    CONTINUATIONS: list[list[int]] = [_arrays[f"p{i}_f32_greedy_tokens"].tolist() for i in range(3)]
LIMIT = 60.0  # seconds: nothing here may hang


def greedy(max_tokens: int = 24, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def make(**options: Any) -> AsyncLLM:
    return AsyncLLM(LLMEngine(FOLDER, **{"dtype": "float32", **options}))


def run(main: Callable[[AsyncLLM], Coroutine[Any, Any, None]], **options: Any) -> None:
    """`main` with an AsyncLLM, in a loop of its own, within LIMIT."""

    async def bounded() -> None:
        async with serving(**options) as llm:
            await asyncio.wait_for(main(llm), LIMIT)

    asyncio.run(bounded())


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[AsyncLLM]:
    llm = make(**options)
    try:
        yield llm
    finally:
        await asyncio.wait_for(llm.close(), LIMIT)
        assert llm.closed
        assert not threads()


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("grok-engine")]


async def last(llm: AsyncLLM, i: int = 0, params: SamplingParams | None = None, **options: Any) -> RequestOutput:
    outputs = [output async for output in llm.generate(PROMPTS[i], params or greedy(), **options)]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


async def rest(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in stream][-1]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(LIMIT):
        while not condition():
            await asyncio.sleep(0.002)


async def all_free(llm: AsyncLLM) -> None:
    """Until nothing runs, every page is free, no request is known and no thread is left."""
    await until(lambda: not llm.engine.has_unfinished_requests() and not threads())
    assert llm.engine.allocator.available == llm.engine.allocator.num_pages
    assert not llm._stepper.all()
