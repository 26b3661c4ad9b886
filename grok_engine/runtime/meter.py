"""What an engine counts and times as it goes. Other threads may read it at any time."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TypedDict, get_args

from grok_engine.config import EngineConfig

from .expert_load import ExpertLoad
from .request import Answer, Request
from .stats import Histogram
from .text import FinishReason

# By vLLM's names. Of a token: since its request arrived, or since the answer's token before it. Of a request that has
# ended: arrival to end, to its first step, from there to the first token, from there to the end; and the decode time
# per token after the first.
TIMES = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
    "request_inference_time_seconds", "request_time_per_output_token_seconds",
)  # fmt: skip
SIZES = ("request_prompt_tokens", "request_generation_tokens")
STEP_TOKENS = "iteration_tokens_total"  # of one step
SECONDS = tuple(digit * 10.0**power for power in range(-4, 4) for digit in (1, 2, 5))


def token_bounds(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, … below `most`, and `most` itself."""
    steps = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return (*(float(step) for step in steps if step < most), float(most))


class Metered(TypedDict):
    """The fields of `EngineStats` that a meter has."""

    steps: int
    generated_tokens: int
    seconds: dict[str, float]
    finished: dict[FinishReason, int]
    histograms: dict[str, Histogram]
    expert_load: list[list[int]] | None


class Meter:
    """The counters of one engine. Its methods are for the thread that steps."""

    def __init__(self, config: EngineConfig) -> None:
        self.steps = self.generated = 0
        self.seconds = dict.fromkeys(("schedule", "forward", "sample", "output"), 0.0)
        self.finished: dict[FinishReason, int] = dict.fromkeys(get_args(FinishReason), 0)
        self.load = ExpertLoad(config.model.num_layers, config.model.num_experts)
        self._began, self._counts_load = 0.0, config.expert_load
        self._counts = {name: _Counts(SECONDS) for name in TIMES}
        self._counts |= {name: _Counts(token_bounds(config.max_len)) for name in SIZES}
        self._counts[STEP_TOKENS] = _Counts(token_bounds(config.max_num_batched_tokens))

    def read(self) -> Metered:
        """All of it now."""
        return {
            "steps": self.steps, "generated_tokens": self.generated, "seconds": dict(self.seconds),
            "finished": dict(self.finished),
            "histograms": {name: counts.read() for name, counts in self._counts.items()},
            "expert_load": self.load.total_LE.tolist() if self._counts_load else None,
        }  # fmt: skip

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()

    def lap(self, part: str) -> None:
        """A part of the step ends, and the next begins."""
        now = time.perf_counter()
        self.seconds[part] += now - self._began
        self._began = now

    def start(self, requests: Iterable[Request]) -> None:
        """These are in the step's plan."""
        now = time.monotonic()
        for request in requests:
            if request.scheduled is None:
                request.scheduled = now

    def step(self, tokens: int, takers: Sequence[tuple[Request, Answer]], now: float) -> None:
        """A step of so many tokens ends, in which each of `takers` took one."""
        self.steps += 1
        self.generated += len(takers)
        self._counts[STEP_TOKENS].add(tokens)
        before: dict[float, int] = {}  # most answers took the last token in the same step
        for _, answer in takers:
            if (last := answer.last_token) is not None:
                before[last] = before.get(last, 0) + 1
            answer.last_token = now
        for last, answers in before.items():
            self._counts["inter_token_latency_seconds"].add(now - last, answers)

    def first_token(self, request: Request) -> None:
        assert request.first_token is not None
        self._counts["time_to_first_token_seconds"].add(request.first_token - request.arrival)

    def finish(self, request: Request) -> None:
        """The request has ended, whatever the reason."""
        counts, scheduled, first, finished = self._counts, request.scheduled, request.first_token, request.finished
        assert finished is not None
        tokens = [len(answer.state.output_ids) for answer in request.answers]
        for answer in request.answers:
            if (reason := answer.text.finish_reason) is not None:
                self.finished[reason] += 1
        counts["e2e_request_latency_seconds"].add(finished - request.arrival)
        counts["request_prompt_tokens"].add(len(request.prompt_ids))
        counts["request_generation_tokens"].add(sum(tokens))
        if scheduled is not None:
            counts["request_queue_time_seconds"].add(scheduled - request.arrival)
            counts["request_inference_time_seconds"].add(finished - scheduled)
            if first is not None:
                counts["request_prefill_time_seconds"].add(first - scheduled)
                counts["request_decode_time_seconds"].add(finished - first)
                if (after := max(tokens) - 1) > 0:
                    counts["request_time_per_output_token_seconds"].add((finished - first) / after)


class _Counts:
    """A histogram that grows."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def read(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.sum)
