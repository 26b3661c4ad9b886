"""Ctrl-C wherever it can fall: the next call works, every request has its end, and no page is lost."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import grok_engine
import grok_kernels
from grok_engine import LLM, LLMEngine, SamplingParams
from tests.engine.invariants import check_allocator, check_scheduler

# where a generator is closed by the collector, Python reports what it raises, and drops it
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
FOLDER = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"
SCALE = int(os.environ.get("GROK_TEST_SCALE", "1"))  # 40: at every place
OURS = tuple(str(Path(package.__file__).parent) for package in (grok_engine, grok_kernels))
LONG, SHORT = list(range(3, 20)), [5, 6, 7]


def interrupted(run: Callable[[], Any], at: int) -> bool:
    """Call `run`, with a KeyboardInterrupt or, as a handler of SIGTERM raises it, a SystemExit at the at-th place in
    our own code where Python would notice a signal: where a function is entered, or a C function returns. Returns
    whether it came to that."""
    events = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal events
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(OURS):
            events += 1
            if events == at:
                sys.setprofile(None)
                raise KeyboardInterrupt if at % 2 else SystemExit

    sys.setprofile(profile)
    with suppress(KeyboardInterrupt, SystemExit):
        run()
    sys.setprofile(None)
    return events >= at


def everywhere(stride: int) -> Iterator[int]:
    """Places to interrupt at: each `stride`-th."""
    return count(1, max(stride // SCALE, 1))


def request(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": 1, "max_tokens": 4, "ignore_eos": True, **options})


REQUESTS = {
    "a": (LONG, request(n=3)),
    "b": (SHORT, request(logprobs=2)),
    "c": (LONG[:9], request(prompt_logprobs=1)),
    "d": (SHORT, request(max_tokens=2)),
}


def answers(output: Any) -> list[list[int]]:
    return [answer.token_ids for answer in output.outputs]


def finish(engine: LLMEngine) -> dict[str, Any]:
    outputs = {}
    for _ in range(100):
        outputs.update({output.request_id: output for output in engine.step() if output.finished})
        if not engine.has_unfinished_requests():
            return outputs
    raise AssertionError("no end")


@pytest.fixture(scope="module")
def engine() -> LLMEngine:
    return LLMEngine(FOLDER, dtype="float32", page_size=4, num_pages=24, max_num_seqs=4, max_num_batched_tokens=16)


@pytest.fixture(scope="module")
def alone(engine: LLMEngine) -> dict[str, list[list[int]]]:
    found = {}
    for name, (prompt, params) in REQUESTS.items():
        engine.add_request(name, prompt, params)
        found[name] = answers(finish(engine)[name])
    return found


def test_an_interrupt_of_the_engine(engine: LLMEngine, alone: dict[str, list[list[int]]]) -> None:
    """Of adding, stepping, aborting and `logits`."""

    def run() -> None:
        for name, (prompt, params) in REQUESTS.items():
            engine.add_request(name, prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                finished[output.request_id] = output
            engine.abort_request("d")
        engine.logits(SHORT)

    ends = {"length": 0, "error": 0, "abort": 0}
    for at in everywhere(41):
        finished: dict[str, Any] = {}
        hit = interrupted(run, at)
        finished |= finish(engine) if engine.has_unfinished_requests() else {}
        engine.abort_request("nobody")  # the next call mends what was interrupted
        for name, output in finished.items():
            for answer, tokens in zip(output.outputs, alone[name], strict=False):
                if answer.finish_reason is not None:
                    ends[answer.finish_reason] += 1
                assert answer.token_ids == tokens[: len(answer.token_ids)], (at, name)
                assert answer.finish_reason != "length" or answer.token_ids == tokens, (at, name)
        assert not engine._requests
        assert not engine._turn.asked
        assert engine.allocator.available == engine.allocator.num_pages, at
        check_scheduler(engine.scheduler)
        check_allocator(engine.allocator, [])
        if not hit:
            break
        if at % 5 == 0:  # and what comes next is right
            engine.add_request("b", *REQUESTS["b"])
            assert answers(finish(engine)["b"]) == alone["b"], at
    assert min(ends.values()) > 1, ends


def test_an_interrupt_is_no_error_in_the_log(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who presses Ctrl-C in `grok-engine chat` wants no traceback."""

    def forward(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "forward", forward)
    engine.add_request("a", SHORT, request())
    with caplog.at_level("INFO", "grok_engine"), pytest.raises(KeyboardInterrupt):
        engine.step()
    (record,) = caplog.records
    assert (record.levelname, record.exc_info) == ("INFO", None)
    assert record.getMessage() == "a step failed, and its 1 sequences end with it"
    monkeypatch.undo()
    assert [answer.finish_reason for answer in finish(engine)["a"].outputs] == ["error"]


def test_an_interrupt_of_one_thread_of_an_llm(engine: LLMEngine, alone: dict[str, list[list[int]]]) -> None:
    """The other thread's call returns what it returns alone, or raises that the step failed."""
    llm = LLM(FOLDER, dtype="float32", page_size=4, num_pages=64)
    results: list[str] = []

    def other() -> None:
        try:
            found = llm.generate(*REQUESTS["a"])[0]
            results.append("right" if answers(found) == alone["a"] else "wrong")
        except RuntimeError as error:
            results.append(type(error.__cause__).__name__)

    for at in everywhere(41):
        thread = threading.Thread(target=other)
        thread.start()
        hit = interrupted(lambda: llm.generate(*REQUESTS["c"]), at)
        thread.join(20)
        assert not thread.is_alive(), at
        assert not llm._calls
        assert not llm._waiting
        assert not llm._stepping
        assert answers(llm.generate(*REQUESTS["b"])[0]) == alone["b"]
        assert llm.engine.allocator.available == 64
        if not hit:
            break
    # RuntimeError: requests or pages were being changed, outside of a step
    assert set(results) <= {"right", "KeyboardInterrupt", "SystemExit", "RuntimeError"}, results
    assert results.count("right") > 5, results
