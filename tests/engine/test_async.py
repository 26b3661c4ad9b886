"""AsyncLLM: many consumers, of which some leave, are slow or send invalid requests."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import tracemalloc
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest

from grok_engine import (
    AsyncLLM,
    CompletionOutput,
    LLMEngine,
    QueueFullError,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutput,
)
from grok_engine.runtime.mailbox import AT_ONCE, Mailbox, wake
from tests.engine.serving import CONTINUATIONS, LIMIT, PROMPTS, all_free, greedy, last, make, rest, run, threads, until

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


def test_many_consumers() -> None:
    async def main(llm: AsyncLLM) -> None:
        results = await asyncio.gather(*(last(llm, i % 3, greedy(1 + i % 24)) for i in range(48)))
        for i, result in enumerate(results):
            assert result.outputs[0].token_ids == CONTINUATIONS[i % 3][: 1 + i % 24]
        assert len({result.request_id for result in results}) == 48
        await all_free(llm)
        assert llm.stats().steps < 200  # together, not one after the other: those would be 588

    run(main)


def test_64_clients_of_which_a_third_leave_and_a_third_are_slow() -> None:
    async def main(llm: AsyncLLM) -> None:
        async def client(i: int) -> None:
            params = greedy(24, output_kind=DELTA) if i % 2 else greedy(24)
            tokens: list[int] = []
            stream = llm.generate(PROMPTS[i % 5 % 3], params)
            async for output in stream:
                new = output.outputs[0].token_ids
                tokens = tokens + new if i % 2 else new
                assert tokens == CONTINUATIONS[i % 5 % 3][: len(tokens)]
                if i % 3 == 1:
                    await asyncio.sleep(0.05)
                elif i % 3 == 2 and len(tokens) > i % 7:
                    if i % 4 == 0:
                        await stream.aclose()
                    return
            assert len(tokens) == 24

        await asyncio.gather(*(client(i) for i in range(64)))
        await all_free(llm)

    run(main, max_num_seqs=24)


def test_kinds_of_outputs() -> None:
    async def main(llm: AsyncLLM) -> None:
        deltas = [o async for o in llm.generate(PROMPTS[0], greedy(output_kind=DELTA))]
        assert [t for o in deltas for t in o.outputs[0].token_ids] == CONTINUATIONS[0]
        finals = [o async for o in llm.generate(PROMPTS[0], greedy(output_kind=FINAL_ONLY))]
        assert [o.outputs[0].token_ids for o in finals] == [CONTINUATIONS[0]]
        wholes = [o.outputs[0].token_ids async for o in llm.generate(PROMPTS[0], greedy())]
        assert wholes == [CONTINUATIONS[0][: len(ids)] for ids in wholes]
        assert wholes[-1] == CONTINUATIONS[0]
        defaults = [o async for o in llm.generate(PROMPTS[0])]
        answer = defaults[-1].outputs[0]
        # they sample: one in a hundred runs meets the end token
        assert answer.finish_reason == "stop" or len(answer.token_ids) == SamplingParams().max_tokens

    run(main)


def test_a_fast_consumer_sees_every_token_as_it_comes() -> None:
    async def main(llm: AsyncLLM) -> None:
        step = llm.engine.step

        def slowly() -> list[RequestOutput]:
            time.sleep(0.02)
            return step()

        llm.engine.step = slowly  # type: ignore[method-assign]
        outputs = [o async for o in llm.generate(PROMPTS[0], greedy(8))]
        assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3, 4, 5, 6, 7, 8]

    run(main)


@pytest.mark.parametrize("n", [1, 3])
def test_a_slow_consumer_gets_everything_and_blocks_nobody(n: int) -> None:
    """The newest of cumulative outputs, or all deltas in one: texts, token ids and log-probabilities of each answer."""

    async def main(llm: AsyncLLM) -> None:
        options: dict[str, Any] = {"n": n, "seed": 5, "max_tokens": 24, "ignore_eos": True, "logprobs": 2}
        alone = (await last(llm, 0, SamplingParams(**options))).outputs
        for kind in (RequestOutputKind.CUMULATIVE, DELTA):
            stream = llm.generate(PROMPTS[0], SamplingParams(**options, output_kind=kind))
            first = await anext(stream)
            assert (await last(llm, 1)).outputs[0].token_ids == CONTINUATIONS[1]
            await all_free(llm)  # its own request has ended too
            second = await anext(stream)
            assert second.finished
            assert [a.index for a in second.outputs] == list(range(n))
            for index, whole in enumerate(alone):
                found = second.outputs[index]
                before = [a for a in first.outputs if a.index == index] if kind is DELTA else []
                assert [t for a in (*before, found) for t in a.token_ids] == whole.token_ids
                assert "".join(a.text for a in (*before, found)) == whole.text
                assert [p for a in (*before, found) for p in a.logprobs or ()] == whole.logprobs
                assert found.cumulative_logprob == whole.cumulative_logprob
                assert found.finish_reason == "length"
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(main)


@pytest.mark.parametrize("delta", [False, True])
def test_unread_outputs_cost_no_more_than_the_answer(delta: bool) -> None:
    count, prompt = 6000, list(range(1000))
    ids = list(range(count))
    text = "".join(f"{i % 1000:4}" for i in ids)

    def output(i: int) -> RequestOutput:
        first = i if delta else 0
        answer = CompletionOutput(0, text[4 * first : 4 * (i + 1)], ids[first : i + 1])
        return RequestOutput("x", None, list(prompt), [answer], i == count - 1, RequestMetrics(0.0, None, None, None))

    async def main() -> None:
        mailbox = Mailbox("x", "x")
        mailbox.delta = delta
        gc.collect()
        tracemalloc.start()
        for i in range(count):
            mailbox.put(output(i))
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        whole = (await mailbox.take()).outputs[0]
        assert whole.token_ids == ids
        assert whole.text == text
        assert kept < 800_000  # 6,000 outputs would be 50 MB, or with the whole text in each of them 200 MB

    asyncio.run(main())


def test_an_output_that_comes_just_before_the_consumer_waits() -> None:
    async def main() -> None:
        mailbox, loop = Mailbox("x", "x"), asyncio.get_running_loop()
        make_future = loop.create_future

        def late() -> asyncio.Future[Any]:
            mailbox.put(RequestOutput("x", None, [5], [], True, RequestMetrics(0.0, None, None, None)))
            return make_future()

        loop.create_future = late  # type: ignore[method-assign]
        async with asyncio.timeout(LIMIT):
            assert (await mailbox.take()).finished

    asyncio.run(main())


def test_a_step_that_wakes_many_consumers_leaves_turns_of_the_loop_to_others() -> None:
    async def main() -> None:
        mailboxes = [Mailbox(str(i), str(i)) for i in range(5 * AT_ONCE + 3)]
        tasks = [asyncio.ensure_future(mailbox.take()) for mailbox in mailboxes]
        await asyncio.sleep(0)
        for mailbox in mailboxes:
            mailbox.put(RequestOutput("x", None, [5], [], True, RequestMetrics(0.0, None, None, None)))
        wake(mailboxes)
        counts = [0]
        for _ in range(20):
            await asyncio.sleep(0)
            counts.append(sum(task.done() for task in tasks))
        assert max(after - before for before, after in pairwise(counts)) == AT_ONCE
        assert counts[-1] == len(tasks)

    asyncio.run(main())


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
        assert llm.stats().generated_tokens < 100

    run(main)


def test_an_id_can_be_used_again_at_once() -> None:
    """An output of the aborted request, from a step still running, does not go to the new request of the same id."""

    async def main(llm: AsyncLLM) -> None:
        for _ in range(10):
            async with aclosing(llm.generate(PROMPTS[1], greedy(), request_id="x")) as outputs:
                async for _ in outputs:
                    break
            found = [output async for output in llm.generate(PROMPTS[2], greedy(3), request_id="x")]
            assert {(o.request_id, tuple(o.prompt_token_ids)) for o in found} == {("x", tuple(PROMPTS[2]))}
            assert found[-1].outputs[0].token_ids == CONTINUATIONS[2][:3]
        busy = llm.generate(PROMPTS[0], greedy(110))
        for _ in range(3):
            await last(llm, 1, greedy(2), request_id="x")
        await busy.aclose()
        await all_free(llm)

    run(main)


def test_what_is_no_engine_is_refused_at_construction() -> None:
    with pytest.raises(TypeError, match="engine='tiny': expected an LLMEngine"):
        AsyncLLM("tiny")  # type: ignore[arg-type]


def test_an_id_in_use() -> None:
    async def main(llm: AsyncLLM) -> None:
        first = llm.generate(PROMPTS[0], greedy(), "x")
        assert first.request_id == "x"
        with pytest.raises(ValueError, match="request_id='x' is in use"):
            llm.generate(PROMPTS[1], request_id="x")
        with pytest.raises(ValueError, match="request_id=7 is not text"):
            llm.generate(PROMPTS[1], request_id=7)  # type: ignore[arg-type]
        assert (await rest(first)).outputs[0].token_ids == CONTINUATIONS[0]
        assert (await last(llm, 1, request_id="x")).outputs[0].token_ids == CONTINUATIONS[1]

    run(main)


def test_streams_that_are_left_closed_or_dropped() -> None:
    """However a consumer goes, its request ends soon after."""

    async def main(llm: AsyncLLM) -> None:
        async for _ in llm.generate(PROMPTS[0], greedy(100)):
            break
        never = llm.generate(PROMPTS[0], greedy(100))
        await never.aclose()
        await never.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(never)
        llm.generate(PROMPTS[0], greedy(100))
        dropped = llm.generate(PROMPTS[0], greedy(100))
        await anext(dropped)
        del dropped
        circle: list[Any] = [llm.generate(PROMPTS[0], greedy(100))]
        await anext(circle[0])
        circle.append(circle)
        del circle
        gc.collect()
        await all_free(llm)
        assert llm.stats().generated_tokens < 100

    run(main)


def test_the_garbage_collector_ends_a_stream_inside_of_anything() -> None:
    """Collections, forced at every allocation, find abandoned streams on all threads and inside every lock."""

    async def main(llm: AsyncLLM) -> None:
        async def abandon() -> None:
            circle: list[Any] = [llm.generate(PROMPTS[1], greedy(100))]
            circle.append(circle)
            await anext(circle[0])

        threshold = gc.get_threshold()
        gc.set_threshold(1, 1, 1)
        try:
            for _ in range(3):
                results = await asyncio.gather(last(llm, 0, greedy(6)), *(abandon() for _ in range(6)))
                assert results[0].outputs[0].token_ids == CONTINUATIONS[0][:6]
        finally:
            gc.set_threshold(*threshold)
        gc.collect()
        await all_free(llm)

    run(main)


def test_two_tasks_cannot_read_one_stream() -> None:
    async def main(llm: AsyncLLM) -> None:
        stream = llm.generate(PROMPTS[0], greedy())
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another task reads this stream"):
            await anext(stream)
        await first
        assert (await rest(stream)).outputs[0].token_ids == CONTINUATIONS[0]

    run(main)


WRONG: list[tuple[Any, Any, Any]] = [
    ([], None, None), ([5, 1024], None, None), ("text", None, None), ([5] * 129, None, None), (5, None, None),
    (None, None, None), ([5], "params", None), ([5], SamplingParams(stop="x"), None),
    ([5], SamplingParams(logit_bias={1024: 1.0}), None), ([5], None, 0), ([5], None, -1.0), ([5], None, float("nan")),
    ([5], None, True), ([5], None, "1"),
]  # fmt: skip


def test_an_invalid_request_raises_at_the_call() -> None:
    class Odd:
        def tolist(self) -> Any:
            raise ZeroDivisionError

    async def main(llm: AsyncLLM) -> None:
        right = [asyncio.create_task(last(llm, i)) for i in range(3)]
        await asyncio.sleep(0)
        for prompt, params, timeout in WRONG:
            with pytest.raises(ValueError, match=r"."):
                llm.generate(prompt, params, timeout=timeout, request_id="x")
        with pytest.raises(ZeroDivisionError):
            llm.generate(Odd(), greedy(), request_id="x")  # type: ignore[arg-type]
        assert [(await r).outputs[0].token_ids for r in right] == CONTINUATIONS
        await all_free(llm)

    run(main)


def test_a_full_queue_raises_at_the_call() -> None:
    async def main(llm: AsyncLLM) -> None:
        streams = [llm.generate(PROMPTS[0], greedy())]
        await anext(streams[0])
        streams += [llm.generate(PROMPTS[0], greedy()) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait: expected fewer than max_waiting=2"):
            llm.generate(PROMPTS[0], greedy())
        for stream in streams:
            assert (await rest(stream)).outputs[0].token_ids == CONTINUATIONS[0]
        assert (await last(llm, 1)).outputs[0].token_ids == CONTINUATIONS[1]

    run(main, max_num_seqs=1, max_waiting=2)


def test_grammars_are_compiled_beside_the_event_loop() -> None:
    """Their errors come at the first await; in no event loop, at the call."""
    pytest.importorskip("llguidance")
    llm = AsyncLLM(LLMEngine("tiny", dtype="float32"))
    wrong = SamplingParams(structured=StructuredOutput(regex="(("))
    right = SamplingParams(structured=StructuredOutput(regex="(yes|no)"), temperature=0)

    async def main() -> None:
        failing, yes = llm.generate("Is it?", wrong), llm.generate("Is it?", right, request_id="yes")
        with pytest.raises(ValueError, match=r"\(\("):
            await anext(failing)
        assert (await rest(yes)).outputs[0].text in ("yes", "no")
        # aborted and left before the engine has them
        compiled, submit, submitted = threading.Event(), llm.engine.submit, list[Any]()

        def late(request: Any) -> None:
            compiled.wait(LIMIT)
            submitted.append(request)
            submit(request)

        llm.engine.submit = late  # type: ignore[method-assign]
        waiting = [llm.generate("Is it?", right, request_id=str(i)) for i in range(8)]
        for i in range(7):
            llm.abort(str(i))
        last = waiting.pop()
        await last.aclose()
        compiled.set()
        for stream in waiting:
            answer = (await anext(stream)).outputs[0]
            assert (answer.token_ids, answer.finish_reason) == ([], "abort")
        assert len(submitted) == 7
        with pytest.raises(ValueError, match=r"\(\("):
            await asyncio.to_thread(llm.generate, "Is it?", wrong)
        stream = await asyncio.to_thread(llm.generate, "Is it?", right)
        assert (await rest(stream)).outputs[0].text in ("yes", "no")
        await all_free(llm)
        await llm.close()

    asyncio.run(asyncio.wait_for(main(), LIMIT))
    assert not threads()


def test_priority() -> None:
    async def main(llm: AsyncLLM) -> None:
        order: list[int] = []

        async def one(priority: int) -> None:
            await last(llm, 0, greedy(3), priority=priority)
            order.append(priority)

        blocking = llm.generate(PROMPTS[1], greedy(20))
        await anext(blocking)
        await asyncio.gather(*(one(p) for p in (2, 0, 1, -1)))
        assert order == [-1, 0, 1, 2]
        await blocking.aclose()

    run(main, max_num_seqs=1)


def test_the_loop_stays_responsive() -> None:
    """Other coroutines run during a slow step."""

    async def main(llm: AsyncLLM) -> None:
        ticks, during = 0, list[int]()
        step = llm.engine.step

        def slowly() -> list[RequestOutput]:
            before = ticks
            time.sleep(0.25)
            during.append(ticks - before)
            return step()

        llm.engine.step = slowly  # type: ignore[method-assign]
        task = asyncio.create_task(last(llm, 0, greedy(4)))
        while not task.done():
            await asyncio.sleep(0.005)
            ticks += 1
        assert (await task).outputs[0].token_ids == CONTINUATIONS[0][:4]
        assert len(during) == 4
        assert min(during) >= 2, during

    run(main)


def test_what_it_passes_on() -> None:
    async def main(llm: AsyncLLM) -> None:
        assert llm.tokenizer is None
        assert llm.encode([5, 6]) == [5, 6]
        assert llm.stats().requests == 0
        assert not llm.closed

    run(main)


def test_using_no_event_loop_to_queue() -> None:
    llm = make()
    stream = llm.generate(PROMPTS[0], greedy())

    async def main() -> None:
        async with llm:
            await until(lambda: not threads())
            assert [o.outputs[0].token_ids async for o in stream] == [CONTINUATIONS[0]]  # it ran meanwhile

    asyncio.run(main())
    assert llm.closed
