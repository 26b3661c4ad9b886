"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass

from .scheduler import SchedulerStats


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Requests, sequences and pages now; steps, tokens and seconds by part of a step since the start."""

    requests: int
    scheduler: SchedulerStats
    kv_bytes: int
    steps: int
    prompt_tokens: int  # computed; those of preempted sequences count again
    generated_tokens: int
    seconds: dict[str, float]
