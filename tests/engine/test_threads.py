"""Many threads, calls from within a step, forks: results stay right, or the call is refused before anything changes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from grok_engine import LLM, EngineBusyError, EngineClosedError, LLMEngine, SamplingParams
from tests.engine.invariants import check_scheduler

FOLDER = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"
PROMPTS = [[5, 6, 7], list(range(3, 40)), [9], [5, 6, 7, 8]]


def params(i: int = 0, **options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": i, "max_tokens": 12, "ignore_eos": True, **options})


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(FOLDER, dtype="float32", page_size=4, num_pages=64, max_num_seqs=8) as model:
        yield model
        if not model.engine.closed:
            assert not model.engine.has_unfinished_requests()
            assert model.engine.allocator.available == 64
            check_scheduler(model.engine.scheduler)


def work(llm: LLM, i: int) -> Any:
    """What one thread does: a batch, a stream, logits, or a stream that it leaves."""
    prompt = PROMPTS[i % len(PROMPTS)]
    if i % 4 == 0:
        return [o.outputs[0].token_ids for o in llm.generate([prompt, prompt[:1]], params(i))]
    if i % 4 == 1:
        return [chunk.token_id for chunk in llm.stream(prompt, params(i))]
    if i % 4 == 2:
        return llm.logits(prompt).sum().item()
    stream = llm.stream(prompt, params(i))
    return [next(stream).token_id for _ in range(4)]


def test_threads_share_one_llm(llm: LLM) -> None:
    expected = [work(llm, i) for i in range(24)]
    begin = threading.Barrier(12)

    def run(start: int) -> list[Any]:
        begin.wait()
        return [work(llm, i) for i in range(start, 24, 12)]

    with ThreadPoolExecutor(12) as pool:
        for start, found in enumerate(pool.map(run, range(12))):
            assert found == expected[start::12]


def test_a_waiter_takes_over(llm: LLM) -> None:
    """The thread that steps leaves after its one token; the other, which waits, has more to come."""
    entered, go_on = threading.Event(), threading.Event()

    def hold(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        entered.set()
        assert go_on.wait(20)
        return logits_V

    expected = llm.generate(PROMPTS[1], params(1))[0].outputs[0].token_ids
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(llm.generate, PROMPTS[0], params(0, max_tokens=1, logits_processors=[hold]))
        assert entered.wait(20)
        long = pool.submit(llm.generate, PROMPTS[1], params(1))
        while not llm._waiting:
            time.sleep(0.001)
        go_on.set()
        assert len(short.result(20)[0].outputs[0].token_ids) == 1
        assert long.result(20)[0].outputs[0].token_ids == expected


def test_close_ends_the_calls_that_wait(llm: LLM) -> None:
    started = threading.Event()

    def slow(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        started.set()
        time.sleep(0.01)
        return logits_V

    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(llm.generate, PROMPTS[0], params(i, logits_processors=[slow])) for i in range(2)]
        assert started.wait(20)
        llm.close()
        for call in calls:
            with pytest.raises(EngineClosedError):
                call.result(20)


@pytest.mark.parametrize("name", ["generate", "stream", "logits", "sleep", "close", "engine.step", "engine.logits"])
def test_a_call_from_within_a_step_is_refused(llm: LLM, name: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: llm.generate([5]),
        "stream": lambda: next(iter(llm.stream([5]))),
        "logits": lambda: llm.logits([5]),
        "sleep": llm.sleep,
        "close": llm.close,
        "engine.step": llm.engine.step,
        "engine.logits": lambda: llm.engine.logits([5]),
    }

    def inside(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        calls[name]()
        return logits_V

    found = llm.generate(PROMPTS[0], params(0, logits_processors=[inside]))[0].outputs[0]
    assert found.finish_reason == "error"
    assert "EngineBusyError" in str(found.error)
    assert llm.generate(PROMPTS[0], params())[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("name", ["step", "logits", "close", "sleep", "wake_up"])
def test_two_threads_on_one_engine_are_refused(name: str) -> None:
    engine = LLMEngine(FOLDER, dtype="float32")
    calls: dict[str, Callable[[], Any]] = {
        "step": engine.step, "logits": lambda: engine.logits([5]), "close": engine.close, "sleep": engine.sleep,
        "wake_up": engine.wake_up,
    }  # fmt: skip
    refused: list[str] = []

    def processor(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        def other() -> None:
            with pytest.raises(EngineBusyError) as caught:
                calls[name]()
            refused.append(str(caught.value))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return logits_V

    engine.add_request("a", PROMPTS[0], params(max_tokens=3, logits_processors=[processor]))
    outputs = [o for _ in range(3) for o in engine.step()]
    assert refused == [f"{name}() was called while another thread runs step(): expected one call at a time"] * 3
    engine.add_request("b", PROMPTS[0], params(max_tokens=3))
    assert [o for _ in range(3) for o in engine.step()][-1].outputs[0].token_ids == outputs[-1].outputs[0].token_ids
    calls[name]()  # alone it is not refused


def test_requests_come_and_go_from_anywhere() -> None:
    """From another thread, from a processor and from a collected generator: all while a step runs."""
    engine = LLMEngine(FOLDER, dtype="float32", page_size=4, num_pages=64)
    alone = LLM(FOLDER, dtype="float32").generate(PROMPTS[0], params(1))[0].outputs[0].token_ids

    def generator() -> Iterator[int]:
        try:
            yield 1
        finally:
            engine.discard_request("d")

    def processor(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        if len(output) == 1:
            engine.abort_request("b")
            engine.add_request("e", PROMPTS[0], params(1))
            thread = threading.Thread(target=lambda: (engine.abort_request(["c", "e2", "?"]), engine.stats()))
            thread.start()
            thread.join()
            left = generator()
            next(left)
            cycle: list[Any] = [left]
            cycle.append(cycle)
            del left, cycle
            gc.collect()
        if len(output) == 3:
            engine.abort_request("a")  # its own
        return logits_V

    engine.add_request("a", PROMPTS[1], params(logits_processors=[processor]))
    for request_id in "bcd":
        engine.add_request(request_id, PROMPTS[0], params(1))
    outputs = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
    ends = {request_id: output.outputs[0].finish_reason for request_id, output in outputs.items()}
    assert ends.pop("d", None) is None  # discarded: its last output is not one that ended it
    assert ends == {"a": "abort", "b": "abort", "c": "abort", "e": "length"}
    assert len(outputs["a"].outputs[0].token_ids) == 4
    assert outputs["e"].outputs[0].token_ids == alone
    assert engine.allocator.available == 64
    check_scheduler(engine.scheduler)


def test_an_exception_that_holds_a_stream_costs_nobody(llm: LLM) -> None:
    """The client's exception keeps the stream alive; the collector ends it during somebody else's step."""

    def client() -> None:
        stream = llm.stream(PROMPTS[0], params())
        try:
            for _ in stream:
                raise OSError("the client left")
        except OSError as error:
            problem = error  # noqa: F841  a cycle: exception, traceback, frame

    client()

    def collect(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        gc.collect()
        return logits_V

    found = llm.generate(PROMPTS[1], params(logits_processors=[collect], logprobs=2))
    assert found[0].outputs[0].finish_reason == "length"


def _use(engine: LLMEngine, connection: Any) -> None:
    errors = []
    for call in (engine.step, lambda: engine.logits([5]), lambda: engine.add_request("b", [5]), engine.close):
        with pytest.raises(RuntimeError) as caught:
            call()
        errors.append(str(caught.value))
    connection.send(errors)
    connection.close()
    os._exit(0)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_is_refused() -> None:
    engine = LLMEngine(FOLDER, dtype="float32")
    engine.add_request("a", PROMPTS[0], params(max_tokens=3))
    engine.step()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_use, args=(engine, there), daemon=True)
    child.start()
    assert here.poll(60), "the child hangs"
    for error in here.recv():
        assert f"a fork of {os.getpid()}, where the engine was made" in error
    child.join(20)
    assert [len(o.outputs[0].token_ids) for _ in range(2) for o in engine.step()] == [2, 3]


def test_an_abort_before_the_request_is_queued() -> None:
    """Another thread aborts it between the two halves of adding it: it does not run, and harms nobody."""
    engine = LLMEngine(FOLDER, dtype="float32")
    ask = engine._turn.ask

    def late(change: Any, argument: Any) -> None:
        engine._turn.ask = ask  # type: ignore[method-assign]
        engine.abort_request("a")
        ask(change, argument)

    engine.add_request("b", PROMPTS[0], params(max_tokens=3))
    engine._turn.ask = late  # type: ignore[method-assign]
    engine.add_request("a", PROMPTS[0], params(max_tokens=3))
    ends = {}
    while engine.has_unfinished_requests():
        ends.update({o.request_id: o.outputs[0].finish_reason for o in engine.step()})
    assert ends == {"a": "abort", "b": "length"}


def test_what_is_asked_for_as_a_step_ends_is_done() -> None:
    """Another thread's abort falls between the last look at such calls and the end of the step's turn."""
    engine = LLMEngine(FOLDER, dtype="float32", page_size=4, num_pages=64)
    engine.add_request("a", PROMPTS[0], params())
    leave = engine._turn.leave

    def late() -> None:
        engine._turn.leave = leave  # type: ignore[method-assign]
        thread = threading.Thread(target=engine.discard_request, args=("a",))
        thread.start()
        thread.join()
        leave()

    engine._turn.leave = late  # type: ignore[method-assign]
    engine.step()
    assert not engine.has_unfinished_requests()
    assert engine.allocator.available == 64


def test_a_change_that_fails_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LLMEngine(FOLDER, dtype="float32")
    engine.add_request("a", PROMPTS[0], params())

    def fails(sequence: Any) -> None:
        raise MemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "add", fails)
        with pytest.raises(MemoryError):
            engine.add_request("b", PROMPTS[0], params())
    ends = {o.request_id: o.outputs[0].finish_reason for o in engine.step()}
    assert ends == {"a": "error"}
    assert not engine.has_unfinished_requests()
    engine.add_request("b", PROMPTS[0], params(max_tokens=1))
    assert engine.step()[0].finished
