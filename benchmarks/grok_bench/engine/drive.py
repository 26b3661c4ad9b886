"""Run requests through an engine, on this thread, and record when each token came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from grok_bench.schema import Moment
from grok_engine import LLMEngine, RequestOutputKind, SamplingParams

from .metrics import Record
from .workload import Job

Progress = Callable[[int], None]  # requests done


@dataclass(slots=True)
class Run:
    """The records of a run; after Ctrl-C those of the requests that had been sent."""

    records: list[Record] = field(default_factory=list)
    timeline: list[Moment] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


class Watch:
    """Samples the engine's statistics every `interval` seconds, between steps; None: never."""

    def __init__(self, engine: LLMEngine, timeline: list[Moment], interval: float | None) -> None:
        self.engine, self.timeline, self.interval = engine, timeline, interval
        self._first = engine.stats()
        self._next = 0.0

    def look(self, t: float, *, due: bool = False) -> None:
        """Take a sample at the time `t` if one is due."""
        if self.interval is None or (t < self._next and not due):
            return
        self._next = t + self.interval
        now, first = self.engine.stats(), self._first
        self.timeline.append(
            Moment(
                t=t,
                running=now.scheduler.running,
                waiting=now.scheduler.waiting,
                kv_pages_used=now.scheduler.pages_used,
                kv_pages=now.scheduler.pages_used + now.scheduler.pages_free,
                prefix_hit_tokens=now.scheduler.hit_tokens - first.scheduler.hit_tokens,
                tokens=now.generated_tokens - first.generated_tokens,
            )
        )


def drive(
    engine: LLMEngine,
    jobs: Sequence[Job],
    *,
    max_concurrency: int | None = None,
    interval: float | None = None,
    progress: Progress | None = None,
) -> Run:
    """Send every job at its arrival, or when one of `max_concurrency` under way ends; step until all are done.

    A request's time starts when it is sent, even if the engine sees it only after the step under way; waiting for
    `max_concurrency` does not count, as with vLLM. A token's time is the end of its step.
    """
    run = Run()
    try:
        _drive(run, engine, jobs, max_concurrency, interval, progress)
    except KeyboardInterrupt:
        run.interrupted = True
    return run


def _drive(
    run: Run,
    engine: LLMEngine,
    jobs: Sequence[Job],
    max_concurrency: int | None,
    interval: float | None,
    progress: Progress | None,
) -> None:
    jobs = sorted(jobs, key=lambda job: job.arrival)
    free = [0.0] * min(max_concurrency or len(jobs), len(jobs))  # when each free slot became free
    heapify(free)
    records = run.records
    watch = Watch(engine, run.timeline, interval)
    done = 0
    began = time.perf_counter()
    try:
        while done < len(jobs):
            now = time.perf_counter() - began
            while len(records) < len(jobs) and free and (job := jobs[len(records)]).arrival <= now:
                params = SamplingParams(
                    max_tokens=job.output_len, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
                )
                engine.add_request(str(len(records)), job.prompt, params)
                records.append(Record(max(job.arrival, heappop(free)), len(job.prompt)))
            watch.look(now)
            if not engine.has_unfinished_requests():
                watch.look(now, due=True)
                time.sleep(max(jobs[len(records)].arrival - (time.perf_counter() - began), 0.0))
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
                    if progress:
                        progress(done)
    finally:
        run.seconds = time.perf_counter() - began
    watch.look(run.seconds, due=True)


def joined(runs: Sequence[Run]) -> Run:
    """Successive runs as one, their times added up; without timelines."""
    whole = Run()
    for run in runs:
        for r in run.records:
            arrival, times = r.arrival + whole.seconds, [t + whole.seconds for t in r.times]
            whole.records.append(Record(arrival, r.input_tokens, times, r.finished, r.error))
        whole.seconds += run.seconds
        whole.interrupted |= run.interrupted
    return whole
