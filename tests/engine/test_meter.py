"""What an engine times, from the times in its outputs."""

from __future__ import annotations

from itertools import pairwise

import pytest

from grok_engine import LLMEngine, RequestMetrics, SamplingParams
from grok_engine.runtime.meter import SECONDS, SIZES, STEP_TOKENS, TIMES, token_bounds
from grok_engine.runtime.stats import Histogram
from tests.engine.test_invariance import SMALL, make_engine


def values(name: str, histogram: Histogram) -> int:
    assert len(histogram.counts) == len(histogram.bounds) + 1, name
    assert all(a < b for a, b in pairwise(histogram.bounds)), name
    return sum(histogram.counts)


def span(since: float | None, until: float | None) -> float:
    assert since is not None
    assert until is not None
    return until - since


def test_bounds() -> None:
    assert token_bounds(1) == (1,)
    assert token_bounds(64) == (1, 2, 5, 10, 20, 50, 64)
    assert token_bounds(1000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert (SECONDS[0], SECONDS[-1]) == (1e-4, 5000)


def test_times_and_sizes_are_those_of_the_outputs() -> None:
    engine = make_engine(SMALL, "float32", "float32", max_num_seqs=8, max_num_batched_tokens=8)
    times: dict[str, RequestMetrics] = {}
    for i, n in enumerate((1, 3, 1)):
        engine.add_request(str(i), range(3, 13), SamplingParams(max_tokens=5, ignore_eos=True, seed=1, n=n))
    engine.add_request("leaves", [5, 6], SamplingParams(max_tokens=50, ignore_eos=True), priority=9)
    while engine.has_unfinished_requests():
        for output in engine.step():
            times[output.request_id] = output.metrics
        if sum(m.finished is not None for m in times.values()) == 3:
            engine.abort_request("leaves")
    stats = engine.stats()
    found = stats.histograms
    assert set(found) == {*TIMES, *SIZES, STEP_TOKENS}
    counts = {name: values(name, histogram) for name, histogram in found.items()}
    assert stats.finished == {"stop": 0, "length": 5, "abort": 1, "error": 0}
    for name in TIMES + SIZES:
        if name != "inter_token_latency_seconds":
            assert counts[name] == 4, name
    assert counts["inter_token_latency_seconds"] == stats.generated_tokens - 6  # all tokens but each answer's first
    assert counts[STEP_TOKENS] == stats.steps
    assert found[STEP_TOKENS].sum == stats.prompt_tokens + counts["inter_token_latency_seconds"]
    assert found["request_prompt_tokens"].sum == 32
    assert found["request_generation_tokens"].sum == stats.generated_tokens
    ends = list(times.values())
    expected = {
        "time_to_first_token_seconds": [span(m.arrival, m.first_token) for m in ends],
        "e2e_request_latency_seconds": [span(m.arrival, m.finished) for m in ends],
        "request_queue_time_seconds": [span(m.arrival, m.scheduled) for m in ends],
        "request_prefill_time_seconds": [span(m.scheduled, m.first_token) for m in ends],
        "request_decode_time_seconds": [span(m.first_token, m.finished) for m in ends],
        "request_inference_time_seconds": [span(m.scheduled, m.finished) for m in ends],
    }
    for name, took in expected.items():
        assert all(t >= 0 for t in took), name
        assert found[name].sum == pytest.approx(sum(took)), name
        for at, bound in enumerate(found[name].bounds):
            assert sum(found[name].counts[: at + 1]) == sum(t <= bound for t in took), (name, bound)
    # a request's tokens come one after the other: the gaps of a request's single answer add up to its decode time
    gaps = found["inter_token_latency_seconds"].sum
    decode = [span(times[name].first_token, times[name].finished) for name in ("0", "2", "1", "1", "1")]
    assert sum(decode) <= gaps <= sum(decode) + span(times["leaves"].first_token, times["leaves"].finished)


def test_a_request_that_never_ran_has_no_times_of_running() -> None:
    engine: LLMEngine = make_engine(SMALL, "float32", "float32")
    engine.add_request("x", [5], SamplingParams())
    engine.abort_request("x")
    (output,) = engine.step()
    assert (output.metrics.scheduled, output.metrics.first_token) == (None, None)
    stats = engine.stats()
    assert stats.finished["abort"] == 1
    filled = {name for name, histogram in stats.histograms.items() if sum(histogram.counts)}
    assert filled == {"e2e_request_latency_seconds", *SIZES}
