"""What a program around the engine does to it: logging handlers that fail, torch's modes, odd texts, other folders."""

from __future__ import annotations

import enum
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grok_engine import LLM, EngineBusyError, EngineClosedError, LLMEngine, QueueFullError, SamplingParams
from tests.engine.invariants import check_scheduler

FOLDER = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"


def greedy(max_tokens: int = 4, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **options)


class Failing(logging.Handler):
    """One that posts to a server that is not there; it calls the engine, too."""

    engine: LLMEngine | None = None
    calls = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.calls += 1
        if self.engine is not None:
            self.engine.step()
        raise ConnectionError("no log server")


@pytest.fixture
def failing() -> Iterator[Failing]:
    logger, handler = logging.getLogger("grok_engine"), Failing()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("calls_back", [False, True])
def test_a_logging_handler_that_fails_costs_nobody(calls_back: bool, failing: Failing) -> None:
    engine = LLMEngine(FOLDER, dtype="float32", page_size=4, num_pages=64)
    failing.engine = engine if calls_back else None
    for request_id in "abc":
        engine.add_request(request_id, [5, 6, 7], greedy(4 if request_id == "b" else 9))
    ends = {}
    engine.abort_request("c")
    for _ in range(9):
        ends.update({o.request_id: o.outputs[0].finish_reason for o in engine.step() if o.finished})
    assert failing.calls > 5
    # a handler that steps takes outputs with it: nothing else goes wrong
    assert set(ends.values()) <= {"length", "abort"}
    assert calls_back or ends == {"a": "length", "b": "length", "c": "abort"}
    assert not engine.has_unfinished_requests()
    assert engine.allocator.available == 64
    check_scheduler(engine.scheduler)


def test_a_logging_handler_that_fails_beside_a_processor_that_does(failing: Failing) -> None:
    """The sampler logs the processor's traceback, in the middle of a step."""

    def fails(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("its own")

    engine = LLMEngine(FOLDER, dtype="float32")
    engine.add_request("bad", [5, 6, 7], greedy(logits_processors=[fails]))
    engine.add_request("good", [5, 6, 7], greedy())
    ends = {o.request_id: o.outputs[0].finish_reason for _ in range(4) for o in engine.step() if o.finished}
    assert ends == {"bad": "error", "good": "length"}


def test_an_engine_that_was_loaded_in_inference_mode() -> None:
    """n = 3 copies pages, which are inference tensors then."""
    expected = LLM(FOLDER, dtype="float32").generate([5, 6, 7], SamplingParams(n=3, seed=1))[0]
    with torch.inference_mode():
        llm = LLM(FOLDER, dtype="float32")
    found = llm.generate([5, 6, 7], SamplingParams(n=3, seed=1))[0]
    assert [a.token_ids for a in found.outputs] == [a.token_ids for a in expected.outputs]


def test_another_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(FOLDER, dtype="float32")
    prompts = [[5, 6, 7], list(range(3, 40))]
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy())]
    torch.set_default_device("meta")
    try:
        found = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy())]
    finally:
        torch.set_default_device(None)
    assert found == expected


def test_waking_up_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FOLDER, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    llm = LLM("model", dtype="float32")
    expected = llm.generate([5], greedy())[0].outputs[0].token_ids
    llm.sleep()
    os.chdir("/")
    llm.wake_up()
    assert llm.generate([5], greedy())[0].outputs[0].token_ids == expected


def test_an_interrupted_sleep_or_close_can_be_called_again() -> None:
    """Freeing takes long for a large model, so Ctrl-C falls into it."""
    engine = LLMEngine(FOLDER, dtype="float32")
    engine.add_request("a", [5], greedy())
    expected = [o.outputs[0].token_ids for _ in range(4) for o in engine.step()][-1]
    free = engine._free

    def interrupted() -> None:
        engine._free = free  # type: ignore[method-assign]
        raise KeyboardInterrupt

    engine._free = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.sleep()
    assert engine.asleep
    engine.wake_up()
    engine.add_request("a", [5], greedy())
    assert [o.outputs[0].token_ids for _ in range(4) for o in engine.step()][-1] == expected
    engine._free = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    engine.close()
    assert not hasattr(engine, "model")
    with pytest.raises(EngineClosedError):
        engine.step()


def test_the_queue_s_limit_counts_requests_without_a_token() -> None:
    """Not answers, not requests that decode, and not aborts that were asked for."""
    engine = LLMEngine(FOLDER, dtype="float32", max_num_seqs=2, max_waiting=2)
    engine.add_request("a", [5], greedy(n=8))
    engine.step()
    engine.add_request("b", [5], greedy())
    engine.abort_request(["?", "??"])
    engine.add_request("c", [5], greedy())
    with pytest.raises(QueueFullError, match="2 requests wait, expected fewer than max_waiting=2"):
        engine.add_request("d", [5], greedy())
    engine.abort_request("b")
    engine.add_request("d", [5], greedy())
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.num_waiting == 0


class Odd(str):
    """An id that is equal to nothing, or raises."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("odd")

    def __hash__(self) -> int:
        return str.__hash__(self)


def test_ids_that_compare_oddly() -> None:
    engine = LLMEngine(FOLDER, dtype="float32")
    engine.add_request("good", [5], greedy())
    engine.add_request(Odd("odd"), [5], greedy())
    engine.abort_request([Odd("odd"), 7, Odd("good ")])  # type: ignore[list-item]
    ends = {o.request_id: o.outputs[0].finish_reason for _ in range(5) for o in engine.step() if o.finished}
    assert ends == {"odd": "abort", "good": "length"}


class Name(str, enum.Enum):
    STOP = "end"
    PROMPT = "wort für wort"


class Greedy(SamplingParams):
    def __init__(self) -> None:
        super().__init__(temperature=0, max_tokens=3)


def test_texts_of_an_enum_and_params_of_a_subclass() -> None:
    """`str()` of such a member is its name in Python 3.11."""
    assert SamplingParams(stop=Name.STOP, bad_words=[Name.STOP]).stop == ("end",)
    llm = LLM("tiny")
    assert llm.encode(Name.PROMPT) == llm.encode("wort für wort")
    tokens = llm.generate("My dear", SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].token_ids
    assert llm.generate("My dear", Greedy())[0].outputs[0].token_ids == tokens
    assert [chunk.token_id for chunk in llm.stream("My dear", Greedy())] == tokens


def test_a_signal_handler_that_generates_is_refused_while_its_thread_waits() -> None:
    """Its call could not return before the call that it interrupts, which waits for another thread."""
    llm, entered, go_on = LLM(FOLDER, dtype="float32"), threading.Event(), threading.Event()

    def hold(output: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        entered.set()
        assert go_on.wait(20)
        return logits_V

    refused: list[BaseException] = []

    def handler(number: int, frame: Any) -> None:
        try:
            llm.generate([5], greedy())
        except EngineBusyError as error:
            refused.append(error)
        go_on.set()

    other = threading.Thread(target=lambda: llm.generate([5], greedy(logits_processors=[hold])))
    before = signal.signal(signal.SIGALRM, handler)
    try:
        other.start()
        assert entered.wait(20)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert len(llm.generate([5, 6], greedy())[0].outputs[0].token_ids) == 4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        other.join(20)
    assert len(refused) == 1
