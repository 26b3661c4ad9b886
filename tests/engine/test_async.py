"""The engine in asyncio programs: many consumers, of which some leave early, are slow or send invalid requests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grok_engine import AsyncLLM, EngineClosedError, LLMEngine, RequestOutput, RequestOutputKind, SamplingParams

FOLDER = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"
with np.load(FOLDER / "golden.npz") as _arrays:
    PROMPTS: list[list[int]] = [_arrays[f"p{i}_tokens"].tolist() for i in range(3)]
    CONTINUATIONS: list[list[int]] = [_arrays[f"p{i}_f32_greedy_tokens"].tolist() for i in range(3)]
LIMIT = 60.0  # seconds: nothing here may hang


def greedy(max_tokens: int = 24, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


def run(main: Callable[[AsyncLLM], Coroutine[Any, Any, None]], **options: Any) -> None:
    """`main` with an AsyncLLM, in a loop of its own, within LIMIT."""

    async def bounded() -> None:
        async with serving(**options) as llm:
            await asyncio.wait_for(main(llm), LIMIT)

    asyncio.run(bounded())


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(LLMEngine(FOLDER, **{"dtype": "float32", **options}))
    try:
        yield llm
    finally:
        await asyncio.wait_for(llm.close(), LIMIT)
        assert llm.engine.closed
        assert not [t for t in threading.enumerate() if t.name.startswith("grok-engine")]


async def last(llm: AsyncLLM, i: int = 0, params: SamplingParams | None = None, **options: Any) -> RequestOutput:
    outputs = [output async for output in llm.generate(PROMPTS[i], params or greedy(), **options)]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def all_free(llm: AsyncLLM) -> None:
    """Until nothing runs and every page is free."""
    await until(lambda: not llm.engine.has_unfinished_requests())
    assert llm.engine.allocator.available == llm.engine.allocator.num_pages
    assert not llm._queues


def test_many_consumers() -> None:
    async def main(llm: AsyncLLM) -> None:
        results = await asyncio.gather(*(last(llm, i % 3, greedy(1 + i % 24)) for i in range(48)))
        for i, result in enumerate(results):
            assert result.outputs[0].token_ids == CONTINUATIONS[i % 3][: 1 + i % 24]
        assert len({result.request_id for result in results}) == 48
        await all_free(llm)
        assert llm.engine.stats().steps < 200  # together, not one after the other: those would be 588

    run(main)


def test_kinds_of_outputs() -> None:
    async def main(llm: AsyncLLM) -> None:
        deltas = [o async for o in llm.generate(PROMPTS[0], greedy(output_kind=RequestOutputKind.DELTA))]
        assert [t for o in deltas for t in o.outputs[0].token_ids] == CONTINUATIONS[0]
        assert len(deltas) == 24
        finals = [o async for o in llm.generate(PROMPTS[0], greedy(output_kind=RequestOutputKind.FINAL_ONLY))]
        assert [o.outputs[0].token_ids for o in finals] == [CONTINUATIONS[0]]
        defaults = [o async for o in llm.generate(PROMPTS[0])]
        answer = defaults[-1].outputs[0]
        assert len(defaults) == len(answer.token_ids)
        # they sample: one in a hundred runs meets the end token
        assert answer.finish_reason == "stop" or len(defaults) == SamplingParams().max_tokens

    run(main)


def test_cancelling_a_consumer_frees_its_pages() -> None:
    async def main(llm: AsyncLLM) -> None:
        started = asyncio.Event()

        async def consume() -> None:
            async for _ in llm.generate(PROMPTS[1], greedy(100), request_id="gone"):
                started.set()

        gone, stays = asyncio.create_task(consume()), asyncio.create_task(last(llm))
        await started.wait()
        assert llm.engine.allocator.available < llm.engine.allocator.num_pages
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert (await stays).outputs[0].token_ids == CONTINUATIONS[0]
        await all_free(llm)
        assert llm.engine.stats().generated_tokens < 100
        # one that is cancelled before it was even handed over, and its name taken again
        task = asyncio.create_task(consume())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (await last(llm, 1, request_id="gone")).outputs[0].token_ids == CONTINUATIONS[1]
        await all_free(llm)

    run(main)


def test_a_name_can_be_taken_again_at_once() -> None:
    """An output of the aborted request, from a step still running, does not go to the new request of the same id."""

    async def main(llm: AsyncLLM) -> None:
        for _ in range(10):
            async with aclosing(llm.generate(PROMPTS[1], greedy(), request_id="x")) as outputs:
                async for _ in outputs:
                    break
            found = [output async for output in llm.generate(PROMPTS[2], greedy(3), request_id="x")]
            assert [o.prompt_token_ids for o in found] == [PROMPTS[2]] * 3
            assert [o.outputs[0].token_ids for o in found] == [CONTINUATIONS[2][: i + 1] for i in range(3)]
        await all_free(llm)

    run(main)


def test_leaving_a_generator_early() -> None:
    async def main(llm: AsyncLLM) -> None:
        outputs = llm.generate(PROMPTS[0], greedy(100))
        async for output in outputs:
            if len(output.outputs[0].token_ids) == 3:
                break
        await outputs.aclose()
        await all_free(llm)
        assert llm.engine.stats().generated_tokens < 20
        never = llm.generate(PROMPTS[0], greedy(100))
        await never.aclose()
        await all_free(llm)

    run(main)


def test_a_slow_consumer_blocks_nobody() -> None:
    async def main(llm: AsyncLLM) -> None:
        release = asyncio.Event()
        found: list[list[int]] = []

        async def slow() -> None:
            async for output in llm.generate(PROMPTS[0], greedy()):
                found.append(output.outputs[0].token_ids)
                await release.wait()

        task = asyncio.create_task(slow())
        await until(lambda: found)
        results = await asyncio.gather(*(last(llm, i) for i in (1, 2)))
        assert [r.outputs[0].token_ids for r in results] == CONTINUATIONS[1:]
        assert len(found) == 1
        await until(lambda: not llm.engine.has_unfinished_requests())  # its own request too
        release.set()
        await task
        assert found == [CONTINUATIONS[0][: i + 1] for i in range(24)]

    run(main)


def test_a_failing_step_reaches_everyone() -> None:
    async def main(llm: AsyncLLM) -> None:
        running = [asyncio.create_task(last(llm, i % 3, greedy(100))) for i in range(6)]
        await until(lambda: llm.engine.stats().steps >= 2)

        def fail(*args: Any) -> Any:
            raise ArithmeticError("the device is gone")

        llm.engine.runner.run = fail  # type: ignore[method-assign]
        late = asyncio.create_task(last(llm))
        results = await asyncio.gather(*running, late, return_exceptions=True)
        assert [type(r) for r in results] == [ArithmeticError] * 7
        assert llm.engine.closed
        with pytest.raises(EngineClosedError) as caught:
            await last(llm)
        assert isinstance(caught.value.__cause__, ArithmeticError)

    run(main)


WRONG: list[tuple[Any, Any]] = [
    ([], None), ([5, 1024], None), ("text", None), ([5] * 129, None), (5, None), (None, None), ([5], "params"),
    ([5], SamplingParams(stop="x")), ([5], SamplingParams(logit_bias={1024: 1.0})),
]  # fmt: skip


def test_a_wrong_request_raises_in_its_own_consumer() -> None:
    async def main(llm: AsyncLLM) -> None:
        async def wrong(prompt: Any, params: Any) -> None:
            async for _ in llm.generate(prompt, params):
                raise AssertionError("it ran")

        right = [asyncio.create_task(last(llm, i)) for i in range(3)]
        results = await asyncio.gather(*(wrong(*w) for w in WRONG), return_exceptions=True)
        assert [type(r) for r in results] == [ValueError] * len(WRONG), results
        assert [(await r).outputs[0].token_ids for r in right] == CONTINUATIONS
        await all_free(llm)

    run(main)


def test_a_prompt_whose_own_code_raises() -> None:
    class Odd:
        def tolist(self) -> Any:
            raise ZeroDivisionError

    async def main(llm: AsyncLLM) -> None:
        right = asyncio.create_task(last(llm))
        with pytest.raises(ZeroDivisionError):
            await anext(llm.generate(Odd(), greedy()))  # type: ignore[arg-type]
        assert (await right).outputs[0].token_ids == CONTINUATIONS[0]

    run(main)


def test_a_name_in_use() -> None:
    async def main(llm: AsyncLLM) -> None:
        first = asyncio.create_task(last(llm, request_id="x"))
        await until(lambda: llm._queues)
        with pytest.raises(ValueError, match="request_id='x' is in use"):
            await last(llm, 1, request_id="x")
        assert (await first).outputs[0].token_ids == CONTINUATIONS[0]
        assert (await last(llm, 1, request_id="x")).outputs[0].token_ids == CONTINUATIONS[1]

    run(main)


def test_priority() -> None:
    async def main(llm: AsyncLLM) -> None:
        order: list[int] = []

        async def one(priority: int) -> None:
            await last(llm, 0, greedy(3), priority=priority)
            order.append(priority)

        await asyncio.gather(*(one(p) for p in (2, 0, 1, -1)))
        assert order == [-1, 0, 1, 2]

    run(main, max_num_seqs=1)


def test_closing_while_it_runs() -> None:
    async def main(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(last(llm, i, greedy(90))) for i in range(3)]
        await until(lambda: llm.engine.stats().steps >= 2)
        tasks.append(asyncio.create_task(last(llm)))  # not handed over yet
        await asyncio.sleep(0)
        await asyncio.gather(llm.close(), llm.close())
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results] == [EngineClosedError] * 4
        assert llm.engine.closed
        with pytest.raises(EngineClosedError):
            await last(llm)
        await llm.close()

    run(main)


def test_closing_what_was_never_used() -> None:
    async def main(llm: AsyncLLM) -> None:
        await llm.close()

    run(main)


def test_the_loop_stays_responsive() -> None:
    """Other coroutines run during a slow step, and while a slow prompt is handed over."""

    async def main(llm: AsyncLLM) -> None:
        ticks, during = 0, list[int]()

        def slow(function: Any) -> Any:
            def call(*args: Any) -> Any:
                before = ticks
                time.sleep(0.25)
                during.append(ticks - before)
                return function(*args)

            return call

        llm.engine.runner.run = slow(llm.engine.runner.run)  # type: ignore[method-assign]
        llm.engine._builder.encode = slow(llm.engine._builder.encode)  # type: ignore[method-assign]
        task = asyncio.create_task(last(llm, 0, greedy(4)))
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        assert (await task).outputs[0].token_ids == CONTINUATIONS[0][:4]
        assert len(during) == 1 + 4
        assert min(during) >= 2, during

    run(main)


def test_one_loop_after_another() -> None:
    async def main(llm: AsyncLLM) -> None:
        assert (await last(llm)).outputs[0].token_ids == CONTINUATIONS[0]

    run(main)
    run(main)


def test_a_loop_that_ends_without_close(recwarn: pytest.WarningsRecorder) -> None:
    """A program that ends with requests running ends cleanly: no warning, no error, no hang."""
    kept: list[AsyncLLM] = []

    async def main() -> None:
        llm = AsyncLLM(LLMEngine(FOLDER, dtype="float32"))
        kept.append(llm)
        tasks: list[Awaitable[Any]] = [asyncio.create_task(last(llm, i, greedy(90))) for i in range(3)]
        assert tasks
        await until(lambda: llm.engine.stats().steps >= 2)

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < LIMIT
    assert not recwarn.list
    kept[0]._thread.shutdown()


def test_importing_starts_nothing() -> None:
    program = """
import sys, threading
import grok_engine
assert threading.active_count() == 1, threading.enumerate()
llm = grok_engine.AsyncLLM(grok_engine.LLMEngine(sys.argv[1]))
assert threading.active_count() == 1, threading.enumerate()
import asyncio.events
assert asyncio.events._get_running_loop() is None
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program, str(FOLDER)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
