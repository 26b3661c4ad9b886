"""AsyncLLM where things end before their time: event loops, steps, threads, the engine."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

import pytest
from torch import Tensor

from grok_engine import (
    AsyncLLM,
    EngineAsleepError,
    EngineBusyError,
    EngineClosedError,
    RequestOutput,
    RequestOutputKind,
)
from tests.engine.serving import (
    CONTINUATIONS,
    LIMIT,
    PROMPTS,
    all_free,
    greedy,
    last,
    make,
    rest,
    run,
    serving,
    threads,
    until,
)


def bounded(main: Awaitable[Any]) -> Any:
    """In an event loop of its own."""

    async def within() -> Any:
        return await asyncio.wait_for(main, LIMIT)

    return asyncio.run(within())


# Event loops


def test_loops_in_succession_over_one_engine() -> None:
    """Each loop ends with streams half read, never read, and still awaited."""
    llm = make()
    kept: list[Any] = []

    async def leaves() -> None:
        stream, never = llm.generate(PROMPTS[0], greedy(100)), llm.generate(PROMPTS[0], greedy(100))
        await anext(stream)
        tasks = [asyncio.create_task(last(llm, i, greedy(100))) for i in range(3)]
        kept.append((stream, never, tasks))
        assert (await last(llm, 1, greedy(3))).outputs[0].token_ids == CONTINUATIONS[1][:3]

    for _ in range(3):
        asyncio.run(asyncio.wait_for(leaves(), LIMIT))
    deadline = time.monotonic() + LIMIT
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()
    for stream, never, tasks in kept:
        for each in (stream, never):  # a later loop gets what there was
            answer = bounded(rest(each)).outputs[0]
            assert answer.finish_reason == "abort"
            assert answer.token_ids[:24] == CONTINUATIONS[0][: len(answer.token_ids)]
        assert all(task.cancelled() for task in tasks)
    asyncio.run(asyncio.wait_for(all_free(llm), LIMIT))
    assert llm.stats().generated_tokens < 9 * 100
    bounded(llm.close())


def test_a_loop_that_is_closed_while_its_tasks_wait() -> None:
    """`asyncio.run` cancels its tasks; a loop closed by hand just goes, and its requests with it."""
    llm = make()
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(last(llm, i, greedy(100))) for i in range(3)]
    only_final = loop.create_task(last(llm, 0, greedy(100, output_kind=RequestOutputKind.FINAL_ONLY)))
    loop.run_until_complete(until(lambda: llm.stats().steps >= 2))
    loop.close()
    bounded(all_free(llm))
    assert llm.stats().generated_tokens < 400
    assert not any(task.done() for task in (*tasks, only_final))
    for task in (*tasks, only_final):
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # it was meant
    assert bounded(last(llm)).outputs[0].token_ids == CONTINUATIONS[0]
    bounded(llm.close())


def test_several_loops_at_once() -> None:
    llm = make()
    found: list[Any] = []

    async def clients() -> None:
        results = await asyncio.gather(*(last(llm, i % 3) for i in range(6)))
        found.append([r.outputs[0].token_ids for r in results] == CONTINUATIONS * 2)

    loops = [threading.Thread(target=bounded, args=(clients(),)) for _ in range(4)]
    for thread in loops:
        thread.start()
    for thread in loops:
        thread.join(LIMIT)
    assert found == [True] * 4
    bounded(llm.close())


def test_a_stream_can_move_to_another_loop() -> None:
    llm = make()
    stream = llm.generate(PROMPTS[0], greedy(output_kind=RequestOutputKind.DELTA))
    tokens: list[int] = []

    async def some(most: int) -> None:
        async for output in stream:
            tokens.extend(output.outputs[0].token_ids)
            if len(tokens) >= most:
                return

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    first.run_until_complete(asyncio.wait_for(some(2), LIMIT))
    second.run_until_complete(asyncio.wait_for(some(24), LIMIT))
    assert tokens == CONTINUATIONS[0]
    first.run_until_complete(llm.close())
    first.close()
    second.close()


# Steps


class Raising:
    """A logits processor that raises at the third token."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __call__(self, token_ids: list[int], logits_V: Tensor) -> Tensor:
        if len(token_ids) == 2:
            raise self.error
        return logits_V


@pytest.mark.parametrize(
    "error", [ValueError, StopIteration, asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit]
)
def test_whatever_a_processor_raises_everyone_gets_an_answer(error: type[BaseException]) -> None:
    async def main(llm: AsyncLLM) -> None:
        params = greedy(logits_processors=[Raising(error)])
        culprit, *others = await asyncio.gather(last(llm, 0, params), *(last(llm, i) for i in range(3)))
        assert culprit.outputs[0].finish_reason == "error"
        assert error.__name__ in (culprit.outputs[0].error or "")
        for i, other in enumerate(others):
            answer = other.outputs[0]
            assert answer.finish_reason in ("length", "error")
            assert answer.token_ids == CONTINUATIONS[i][: len(answer.token_ids)]
        assert [(await last(llm, i)).outputs[0].token_ids for i in range(3)] == CONTINUATIONS
        await all_free(llm)

    run(main)


def test_a_failed_forward_pass_ends_its_requests_alone() -> None:
    async def main(llm: AsyncLLM) -> None:
        forward, failures = llm.engine.runner.forward, [ArithmeticError("odd"), KeyboardInterrupt()]

        def fail(*args: Any) -> Any:
            if len(args[0].entries) == 3 and failures:
                raise failures.pop()
            return forward(*args)

        llm.engine.runner.forward = fail  # type: ignore[method-assign]
        for _ in range(2):
            results = await asyncio.gather(*(last(llm, i) for i in range(3)))
            assert {r.outputs[0].finish_reason for r in results} == {"error"}
        assert (await last(llm)).outputs[0].token_ids == CONTINUATIONS[0]
        await all_free(llm)

    run(main)


def test_an_engine_that_closes_itself_ends_everyone() -> None:
    async def main(llm: AsyncLLM) -> None:
        forward = llm.engine.runner.forward

        def fail(*args: Any) -> Any:
            if llm.stats().steps < 3:
                return forward(*args)
            raise ArithmeticError("the device is gone")

        llm.engine.runner.forward = fail  # type: ignore[method-assign]
        llm.engine.runner.recover = lambda: False  # type: ignore[method-assign]
        results = await asyncio.gather(*(last(llm, i % 3, greedy(100)) for i in range(6)), return_exceptions=True)
        assert [type(r) for r in results] == [EngineClosedError] * 6
        assert llm.closed
        for result in results:
            assert isinstance(result, EngineClosedError)
            assert isinstance(result.__cause__, ArithmeticError)
        with pytest.raises(EngineClosedError):
            llm.generate(PROMPTS[0])

    run(main)


@pytest.mark.parametrize("place", ["step", "_deliver", "_sweep"])
@pytest.mark.parametrize("error", [MemoryError, SystemExit, asyncio.CancelledError])
def test_a_stepping_thread_that_dies(place: str, error: type[BaseException]) -> None:
    """Everyone gets an error of their own, and later requests are served."""

    async def main(llm: AsyncLLM) -> None:
        owner: Any = llm.engine if place == "step" else llm._stepper
        method, calls = getattr(owner, place), 0

        def fail(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if 3 <= calls <= 4:
                raise error
            return method(*args)

        setattr(owner, place, fail)
        tasks = [asyncio.create_task(last(llm, i)) for i in range(3)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results] == [RuntimeError] * 3
        assert len(set(map(id, results))) == 3
        assert not llm.engine.has_unfinished_requests()
        assert all(isinstance(r, RuntimeError) and isinstance(r.__cause__, error) for r in results)
        if place != "step":
            with pytest.raises(RuntimeError):
                await last(llm)
        assert [(await last(llm, i)).outputs[0].token_ids for i in range(3)] == CONTINUATIONS
        await all_free(llm)

    run(main)


def test_a_stepping_thread_that_is_killed() -> None:
    """An exception from outside, at any place of the thread: no consumer hangs."""

    async def main(llm: AsyncLLM) -> None:
        for _ in range(10):
            tasks = [asyncio.create_task(last(llm, i)) for i in range(3)]
            await until(lambda: threads() and llm.engine.has_unfinished_requests())
            await asyncio.sleep(0.003)
            for thread in threads():
                assert thread.ident is not None
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            for i, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
                if isinstance(result, BaseException):
                    assert isinstance(result, RuntimeError)
                elif result.outputs[0].finish_reason == "length":
                    assert result.outputs[0].token_ids == CONTINUATIONS[i]
        await until(lambda: not threads())
        assert (await last(llm)).outputs[0].token_ids == CONTINUATIONS[0]
        await all_free(llm)

    run(main)


def test_others_who_use_the_engine() -> None:
    """`logits` on another thread delays a step. Outputs that someone else's `step` took end in an error."""

    async def main(llm: AsyncLLM) -> None:
        stop = threading.Event()

        def score() -> None:
            while not stop.is_set():
                with suppress(EngineBusyError):
                    llm.engine.logits(PROMPTS[1])
                time.sleep(0.0005)

        thread = threading.Thread(target=score)
        thread.start()
        try:
            assert [r.outputs[0].token_ids for r in await asyncio.gather(*(last(llm, i) for i in range(3)))] == (
                CONTINUATIONS
            )
        finally:
            stop.set()
            thread.join(LIMIT)
        stream = llm.generate(PROMPTS[0], greedy(100), request_id="x")
        await anext(stream)
        llm.engine.discard_request("x")
        with pytest.raises(RuntimeError, match="the engine dropped the request"):
            await rest(stream)
        assert (await last(llm)).outputs[0].token_ids == CONTINUATIONS[0]

    run(main)


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("no thread")


def test_a_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(llm: AsyncLLM) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError, match="no thread"):
                llm.generate(PROMPTS[0], request_id="x")
            with pytest.raises(RuntimeError, match="no thread"):
                await llm.sleep()
        assert not llm.engine.has_unfinished_requests()
        assert (await last(llm, request_id="x")).outputs[0].token_ids == CONTINUATIONS[0]

    run(main)


# Requests


def test_a_deadline() -> None:
    async def main(llm: AsyncLLM) -> None:
        step = llm.engine.step

        def slowly() -> list[RequestOutput]:
            time.sleep(0.01)
            return step()

        llm.engine.step = slowly  # type: ignore[method-assign]
        began = time.monotonic()
        late, in_time = await asyncio.gather(last(llm, 0, greedy(100), timeout=0.2), last(llm, 1, timeout=LIMIT))
        assert time.monotonic() - began < 1.5
        answer = late.outputs[0]
        assert answer.finish_reason == "abort"
        assert 1 <= len(answer.token_ids) < 100
        assert answer.token_ids[:24] == CONTINUATIONS[0][: len(answer.token_ids)]
        assert in_time.outputs[0].token_ids == CONTINUATIONS[1]
        # one that is over before its first step, and has nothing
        waiting = await last(llm, 0, greedy(3), timeout=1e-9)
        assert waiting.outputs[0].finish_reason in ("abort", "length")
        await all_free(llm)

    run(main)


def test_aborting_by_id() -> None:
    async def main(llm: AsyncLLM) -> None:
        stream = llm.generate(PROMPTS[0], greedy(100), request_id="x")
        first = await anext(stream)
        threading.Thread(target=llm.abort, args=("x",)).start()
        answer = (await rest(stream)).outputs[0]
        assert answer.finish_reason == "abort"
        assert answer.token_ids[: len(first.outputs[0].token_ids)] == first.outputs[0].token_ids
        llm.abort("x")
        llm.abort("unknown")
        await all_free(llm)

    run(main)


def test_draining() -> None:
    async def main(llm: AsyncLLM) -> None:
        assert await llm.drain()
        with pytest.raises(EngineClosedError, match="draining"):
            llm.generate(PROMPTS[0])
        await llm.wake_up()
        streams = [llm.generate(PROMPTS[i], greedy()) for i in range(3)]
        draining = asyncio.create_task(llm.drain(LIMIT))
        await asyncio.sleep(0)
        with pytest.raises(EngineClosedError, match="draining"):
            llm.generate(PROMPTS[0])
        assert await draining
        assert [(await rest(s)).outputs[0].token_ids for s in streams] == CONTINUATIONS
        await llm.wake_up()
        streams = [llm.generate(PROMPTS[i], greedy(110)) for i in range(3)]
        assert not await llm.drain(0.01)
        for stream in streams:
            answer = (await rest(stream)).outputs[0]
            assert answer.finish_reason == "abort"
            assert len(answer.token_ids) < 110
        await all_free(llm)

    run(main, max_num_seqs=1)


def test_sleeping() -> None:
    async def main(llm: AsyncLLM) -> None:
        stream = llm.generate(PROMPTS[0], greedy())
        with pytest.raises(EngineBusyError):
            await llm.sleep()
        assert (await rest(stream)).outputs[0].token_ids == CONTINUATIONS[0]
        await llm.sleep()
        with pytest.raises(EngineAsleepError):
            llm.generate(PROMPTS[0])
        await llm.wake_up()
        assert (await last(llm)).outputs[0].token_ids == CONTINUATIONS[0]

    run(main)


# The end


def test_closing_while_it_runs() -> None:
    async def main(llm: AsyncLLM) -> None:
        tasks = [asyncio.create_task(last(llm, i, greedy(90))) for i in range(3)]
        await until(lambda: llm.stats().steps >= 2)
        stream = llm.generate(PROMPTS[0], greedy(90))
        await asyncio.gather(llm.close(), llm.close())
        results = await asyncio.gather(*tasks, anext(stream), return_exceptions=True)
        assert [type(r) for r in results] == [EngineClosedError] * 4
        assert llm.closed
        with pytest.raises(EngineClosedError):
            llm.generate(PROMPTS[0])
        llm.abort("x")
        assert await llm.drain()
        await llm.close()

    run(main)


def test_a_cancelled_close_closes_all_the_same() -> None:
    async def main(llm: AsyncLLM) -> None:
        stream = llm.generate(PROMPTS[0], greedy(90))
        closing = asyncio.create_task(llm.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(EngineClosedError):
            await rest(stream)
        await until(lambda: llm.closed)

    run(main)


def test_closing_what_was_never_used() -> None:
    async def main(llm: AsyncLLM) -> None:
        await llm.close()

    run(main)


def test_what_finished_can_be_read_after_the_close() -> None:
    async def main() -> None:
        async with serving() as llm:
            stream = llm.generate(PROMPTS[0], greedy())
            assert await llm.drain()
        assert [o.outputs[0].token_ids async for o in stream] == [CONTINUATIONS[0]]

    bounded(main())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_stream_left_from_elsewhere_ends_for_its_reader(elsewhere: bool) -> None:
    """`aclose` by another task, or in another thread's loop, while a task waits for the next output."""

    async def main(llm: AsyncLLM) -> None:
        stream = llm.generate(PROMPTS[0], greedy(100))
        await anext(stream)
        reader = asyncio.create_task(rest(stream))
        await asyncio.sleep(0)
        if elsewhere:
            await asyncio.to_thread(lambda: asyncio.run(stream.aclose()))
        else:
            await stream.aclose()
        with suppress(IndexError):  # `rest` returns its last output, and there may be none
            await reader
        await all_free(llm)

    run(main)


@pytest.mark.parametrize("name", ["generate", "drain", "sleep", "close"])
def test_a_call_from_within_a_step_ends_its_request_alone(name: str) -> None:
    async def main(llm: AsyncLLM) -> None:
        async def call() -> None:
            await (last(llm) if name == "generate" else getattr(llm, name)())

        def processor(output: list[int], logits_V: Tensor) -> Tensor:
            asyncio.run(call())
            return logits_V

        bad, good = await asyncio.gather(last(llm, 0, greedy(5, logits_processors=[processor])), last(llm, 1))
        assert "EngineBusyError" in str(bad.outputs[0].error)
        assert good.outputs[0].token_ids == CONTINUATIONS[1]

    run(main)


@pytest.mark.parametrize("timeout", ["x", float("nan"), -1, object()])
def test_a_drain_that_is_refused_lets_requests_in(timeout: Any) -> None:
    async def main(llm: AsyncLLM) -> None:
        with pytest.raises(ValueError, match="is not a number of seconds"):
            await llm.drain(timeout)
        assert (await last(llm)).outputs[0].token_ids == CONTINUATIONS[0]

    run(main)
