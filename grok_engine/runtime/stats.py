"""What an engine counts and times."""

from __future__ import annotations

from dataclasses import dataclass, field

from .scheduler import SchedulerStats
from .text import FinishReason


@dataclass(frozen=True, slots=True)
class Histogram:
    """counts[i]: the values that are at most bounds[i] and above bounds[i − 1]; the last is of those above all bounds.
    sum: of all values."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Requests, sequences and pages now; steps, tokens and seconds by part of a step since the start.

    finished: answers by the reason of their end. histograms: by vLLM's name of the metric without its prefix, times in
    seconds: those of `runtime/meter.py`. expert_load: tokens that each expert of each layer got, [layer][expert]; None
    unless the engine was made with `expert_load`.
    """

    requests: int
    scheduler: SchedulerStats
    kv_bytes: int
    steps: int
    prompt_tokens: int  # computed; those of preempted sequences count again
    generated_tokens: int
    seconds: dict[str, float]
    finished: dict[FinishReason, int]
    histograms: dict[str, Histogram] = field(repr=False)
    expert_load: list[list[int]] | None = field(repr=False)
