"""A run as a result of the suite's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from grok_bench.schema import EngineResult, Scalar

from .drive import Run
from .metrics import good, latencies, percentiles

Protocol = Literal["latency", "throughput", "serve"]


def summarize(
    protocol: Protocol,
    model: str,
    parameters: dict[str, Scalar],
    run: Run,
    *,
    load_seconds: float,
    peak_memory_bytes: int,
    batch_seconds: Sequence[float] | None = None,
    slo: dict[str, float] | None = None,
) -> EngineResult:
    """The result of a run. `batch_seconds` are what E2E is of, in place of each request's."""
    records = run.records
    metrics = latencies(records)
    if batch_seconds is not None:
        metrics["e2e"] = percentiles(batch_seconds)
    completed = sum(r.finished for r in records)
    inputs = sum(r.input_tokens for r in records if r.times)
    outputs = sum(len(r.times) for r in records)
    seconds = max(run.seconds, 1e-9)
    return EngineResult(
        protocol=protocol,
        model=model,
        parameters=parameters,
        duration_seconds=run.seconds,
        completed=completed,
        failed=sum(r.error is not None for r in records),
        input_tokens=inputs,
        output_tokens=outputs,
        requests_per_second=completed / seconds,
        output_tokens_per_second=outputs / seconds,
        total_tokens_per_second=(inputs + outputs) / seconds,
        goodput_per_second=good(records, slo) / seconds if slo else None,
        slo=slo,
        metrics=metrics,
        load_seconds=load_seconds,
        peak_memory_bytes=peak_memory_bytes,
        timeline=run.timeline,
        requests=[record.shown() for record in records],
    )
