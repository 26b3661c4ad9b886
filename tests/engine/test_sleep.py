"""Sleeping frees the weights, waking loads them: the same tokens, and flat memory."""

from __future__ import annotations

import gc
import logging
import os
import weakref
from pathlib import Path

import pytest
import torch

from grok_engine import LLM, EngineAsleepError, EngineBusyError, EngineClosedError, LLMEngine, SamplingParams

FOLDER = Path(__file__).parents[1] / "data" / "goldens" / "g8-a-emb128-k16"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def resident() -> int:
    """Bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_sleep_and_wake_up() -> None:
    llm = LLM(FOLDER, dtype="float32")
    expected = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    llm.sleep()
    assert llm.engine.asleep
    assert not llm.engine.closed
    for call in (lambda: llm.generate([5]), lambda: llm.logits([5]), llm.engine.step, llm.engine.stats, llm.sleep):
        with pytest.raises(EngineAsleepError, match="wake_up"):
            call()
    llm.wake_up()
    llm.wake_up()
    found = llm.generate([5, 6, 7], GREEDY)[0]
    assert found.outputs[0].token_ids == expected
    assert found.cached_tokens == 0
    llm.sleep()
    llm.close()
    for call in (llm.wake_up, lambda: llm.generate([5])):
        with pytest.raises(EngineClosedError):
            call()


def test_as_many_pages_after_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much memory a device has left then: the scheduler counts on them."""
    llm = LLM(FOLDER, dtype="float32")
    before = llm.engine.runner.num_pages
    llm.sleep()
    monkeypatch.setattr("grok_engine.runtime.memory.CPU_KV_BYTES", 1)
    llm.wake_up()
    assert llm.engine.runner.num_pages == llm.engine.allocator.num_pages == before


def test_what_is_dropped_is_freed_at_once() -> None:
    """Without the garbage collector, which may come late: weights are large."""
    llm = LLM(FOLDER, dtype="float32")
    llm.generate([[5, 6, 7], [8]], GREEDY)
    next(iter(llm.stream([5], GREEDY)))
    left = weakref.ref(llm.model)
    gc.collect()
    gc.disable()
    try:
        del llm
        assert left() is None
    finally:
        gc.enable()


def test_no_sleep_while_requests_run() -> None:
    engine = LLMEngine(FOLDER, dtype="float32")
    engine.add_request("a", [5], GREEDY)
    with pytest.raises(EngineBusyError, match="1 unfinished"):
        engine.sleep()
    engine.abort_request("a")
    engine.step()
    engine.sleep()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_fifty_cycles_leave_memory_flat() -> None:
    """If each cycle left its weights and pages behind, there would be 450 MB at the end."""
    llm = LLM(FOLDER, dtype="float32", kv_memory=8 << 20)
    expected = llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids
    sizes = []
    for _ in range(50):
        llm.sleep()
        llm.wake_up()
        assert llm.generate([5, 6, 7], GREEDY)[0].outputs[0].token_ids == expected
        sizes.append(resident())
    assert sizes[-1] - sizes[4] < 30 << 20, [size >> 20 for size in sizes]


def test_logging(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """Load, requests, aborts and failed steps are logged under "grok_engine"; nothing is printed by default."""
    with caplog.at_level(logging.DEBUG, "grok_engine"):
        engine = LLMEngine(FOLDER, dtype="float32")
        engine.add_request("one", [5, 6], GREEDY)
        engine.add_request("two", [5, 6], GREEDY)
        engine.abort_request("two")
        plain, engine.runner.run = engine.runner.run, lambda *_: torch.empty(0)[1]  # type: ignore[method-assign]
        engine.step()
        engine.runner.run = plain  # type: ignore[method-assign]
        engine.close()
    found = [(record.levelname, record.getMessage()) for record in caplog.records if record.name.startswith("grok_e")]
    for level, text in [
        ("INFO", f"loaded {FOLDER} in "),
        ("DEBUG", "request 'one': 2 prompt tokens"), ("INFO", "request 'two': aborted"),
        ("ERROR", "a step failed, and its 1 sequences end with it"), ("INFO", "closed"),
    ]:  # fmt: skip
        assert any(level == found_level and text in message for found_level, message in found), (level, text, found)
    assert capfd.readouterr() == ("", "")
