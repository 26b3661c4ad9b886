"""Send requests to a server over HTTP, each at its time, and record when each token came."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .drive import Run
from .http_client import HttpJob, Target, send, served_model
from .metrics import Record


def drive_http(
    target: Target,
    jobs: Sequence[HttpJob],
    times: Sequence[float],
    max_concurrency: int | None = None,
    *,
    warmup: Sequence[HttpJob] = (),
    timeout: float = 600.0,
) -> tuple[Target, Run, float]:
    """Send `warmup` one after the other, then every job at its time, and read all streams to their ends.

    Gives the target with the model that was found, if it names none; the run; and how late the latest request was sent.
    As with vLLM, a request waits for `max_concurrency` before its time starts. `timeout`: seconds without a byte. After
    Ctrl-C the records are those of the requests that had been sent. ValueError if the server refuses the warmup.
    """
    found, run = [target], Run()
    late = [0.0]

    async def main() -> None:
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=timeout)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits) as session:
            try:
                if not target.model:
                    found[0] = replace(target, model=await served_model(session, target.base))
            except (aiohttp.ClientError, OSError) as error:
                raise ValueError(f"{target.base} does not answer: {error or type(error).__name__}") from None
            for job in warmup:
                record = Record(0.0, 0)
                await send(session, found[0], job, record, 0.0)
                if record.error is not None:
                    raise ValueError(f"{target.base} failed a warmup: {record.error}")
            await _send_all(session, found[0], jobs, times, max_concurrency, run, late)

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        run.interrupted = True
    return found[0], run, late[0]


async def _send_all(
    session: Any,
    target: Target,
    jobs: Sequence[HttpJob],
    times: Sequence[float],
    max_concurrency: int | None,
    run: Run,
    late: list[float],
) -> None:
    free = asyncio.Semaphore(max_concurrency or len(jobs))
    began = time.perf_counter()

    async def one(job: HttpJob, due: float) -> None:
        record = Record(0.0, 0)
        run.records.append(record)
        if math.isfinite(due):
            late[0] = max(late[0], time.perf_counter() - began - due)
        try:
            await send(session, target, job, record, began)
        finally:
            free.release()

    tasks = []
    try:
        for job, at in zip(jobs, times, strict=True):
            await asyncio.sleep(max(began + at - time.perf_counter(), 0.0))
            waits = free.locked()
            await free.acquire()
            due = math.inf if waits or not at else at  # nothing is late that had to wait, or that all came at once
            tasks.append(asyncio.create_task(one(job, due)))
        await asyncio.gather(*tasks)
    finally:
        run.seconds = time.perf_counter() - began
