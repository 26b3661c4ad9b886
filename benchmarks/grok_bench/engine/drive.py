"""Run requests through an engine, on this thread, and record when each token came."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from grok_engine import LLMEngine, RequestOutputKind, SamplingParams

from .metrics import Record
from .workload import Job


@dataclass(slots=True)
class Run:
    """The records of a run; after Ctrl-C those of the requests that had been sent."""

    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def drive(
    engine: LLMEngine,
    jobs: Sequence[Job],
    times: Sequence[float] | None = None,
    max_concurrency: int | None = None,
) -> Run:
    """Send every job at its time, or when one of `max_concurrency` under way ends; step until all are done.

    `times`: ascending, in seconds after the start; None: all at once. A request's time starts when it is sent, even if
    the engine sees it only after the step under way; waiting for `max_concurrency` does not count, as with vLLM. A
    token's time is the end of its step.
    """
    times = times or [0.0] * len(jobs)
    free = [0.0] * min(max_concurrency or len(jobs), len(jobs))  # when each free slot became free
    heapify(free)
    run, done, began = Run(), 0, time.perf_counter()
    records = run.records
    try:
        while done < len(jobs):
            now = time.perf_counter() - began
            while len(records) < len(jobs) and free and times[len(records)] <= now:
                _send(engine, str(len(records)), jobs[len(records)])
                records.append(Record(max(times[len(records)], heappop(free)), len(jobs[len(records)].prompt)))
            if not engine.has_unfinished_requests():
                time.sleep(max(times[len(records)] - (time.perf_counter() - began), 0.0))
                continue
            outputs = engine.step()
            now = time.perf_counter() - began
            for output in outputs:
                record, answer = records[int(output.request_id)], output.outputs[0]
                record.times += [now] * len(answer.token_ids)
                if output.finished:
                    record.finished, record.error = answer.error is None, answer.error
                    heappush(free, now)
                    done += 1
    except KeyboardInterrupt:
        run.interrupted = True
    run.seconds = time.perf_counter() - began
    return run


def _send(engine: LLMEngine, name: str, job: Job) -> None:
    kind = RequestOutputKind.DELTA
    params = SamplingParams(max_tokens=job.output_len, temperature=0.0, ignore_eos=True, output_kind=kind)
    engine.add_request(name, job.prompt, params)


def joined(runs: Sequence[Run]) -> Run:
    """Successive runs as one, their times added up."""
    whole = Run()
    for run in runs:
        for r in run.records:
            arrival, times = r.arrival + whole.seconds, [t + whole.seconds for t in r.times]
            whole.records.append(Record(arrival, r.input_tokens, times, r.finished, r.error))
        whole.seconds += run.seconds
        whole.interrupted |= run.interrupted
    return whole
