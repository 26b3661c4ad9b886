"""Clients of the three faces: a step loop over LLMEngine, threads in LLM, event loops over AsyncLLM."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import Any

from grok_engine import AsyncLLM, RequestOutputKind

from .chaos import failing, interrupts, is_injected
from .round import Round, processors, settle
from .traffic import Job


def step_loop(r: Round, rate: float, ctrl_c: float) -> None:
    """The main thread steps. Others add requests and abort them, between steps and during them."""
    engine, fed = r.engine, threading.Event()
    kinds = [RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY] if ctrl_c else list(RequestOutputKind)

    def feed(rng: random.Random) -> None:
        for job in rng.choices(r.jobs, k=r.runs_each):
            run = r.run(rng, "engine", job, *kinds)
            try:
                engine.add_request(run.request_id, job.prompt, run.params(*processors(r, rng, run)), job.priority)
            except Exception as error:
                r.failed(run, error)
                time.sleep(0.05)
            if rng.random() < 0.1:
                r.bad(rng, lambda prompt, params: engine.add_request("bad", prompt, params))
            if rng.random() < 0.7:
                time.sleep(rng.random() * 0.02)
            engine.stats()

    def abort(rng: random.Random) -> None:
        for _ in range(r.runs_each // 2):
            fed.wait(rng.random() * 0.1)
            open_runs = [run for run in list(r.runs.values()) if run.face == "engine" and run.ended == "unanswered"]
            if open_runs:
                r.abort(run := rng.choice(open_runs), "thread")
                if rng.random() < 0.3:
                    run.fate = "discard"
                    engine.discard_request(run.request_id)
                else:
                    engine.abort_request([run.request_id, "unknown"])

    before = r.events["Ctrl-C"]
    feeders, aborter = r.threads([feed, feed]), r.threads([abort])
    with failing(r.rng, rate, r.events), interrupts(r.rng, ctrl_c, r.events) if ctrl_c else nullcontext():
        while any(thread.is_alive() for thread in feeders) or engine.has_unfinished_requests():
            try:
                outputs = engine.step()
            except BaseException as error:  # noqa: PERF203
                r.events["steps that raised"] += 1
                if not is_injected(error):
                    r.wrong.append(f"step raised {error!r}")
                    break
            else:
                for output in outputs:
                    if output.request_id in r.runs:
                        r.runs[output.request_id].take(output)
                    else:
                        r.wrong.append(f"an output of {output.request_id!r}, which another client had")
                if not outputs:
                    time.sleep(0.001)
    fed.set()
    for thread in (*feeders, *aborter):
        thread.join()
    r.lost += (r.events["Ctrl-C"] - before) * engine.config.max_num_seqs


def llm_threads(r: Round, rate: float, ctrl_c: float) -> None:
    """Threads call `generate` and `stream`, of which some are left half read and collected; so does the main thread."""
    llm = r.llm

    def client(rng: random.Random) -> None:
        left = r.runs_each
        while left > 0:
            jobs = rng.choices(r.jobs, k=rng.choice([1, 1, 2, 4]))
            left -= len(jobs)
            if len(jobs) == 1 and jobs[0].params.n == 1:
                stream(rng, jobs[0])
            else:
                generate(rng, jobs)
            if rng.random() < 0.1:
                r.bad(rng, rng.choice([lambda prompt, params: llm.generate([prompt], params), llm.stream]))
            if rng.random() < 0.1:
                score(rng.choice(r.jobs))
            if rng.random() < 0.2:
                gc.collect()

    def score(job: Job) -> None:
        try:
            r.logits.append((job, llm.logits(job.prompt)))
        except BaseException as error:
            if not is_injected(error) and "are free" not in str(error):  # pages, while others have them
                r.wrong.append(f"logits raised {error!r}")

    def generate(rng: random.Random, jobs: list[Job]) -> None:
        runs = [r.run(rng, "llm", job, RequestOutputKind.FINAL_ONLY) for job in jobs]
        params = [run.params(*(() if number else processors(r, rng, run))) for number, run in enumerate(runs)]
        try:
            outputs = llm.generate([job.prompt for job in jobs], params)
        except BaseException as error:
            for run in runs:
                r.failed(run, error)
        else:
            for run, output in zip(runs, outputs, strict=True):
                run.take(output)

    def stream(rng: random.Random, job: Job) -> None:
        run, leaves = r.run(rng, "llm", job), rng.choice([None, None, 0, 1, 5])
        try:
            chunks = llm.stream(job.prompt, run.params(*processors(r, rng, run)))
            if leaves == 0:
                r.abort(run, "unread stream")
            for number, chunk in enumerate(chunks if leaves != 0 else (), 1):
                run.chunk(chunk)
                if number == leaves and run.ended == "unanswered":
                    r.abort(run, "collected stream")
                    cycle = [chunks]
                    cycle.append(cycle)  # type: ignore[arg-type]
                    break
                if rng.random() < 0.05:
                    time.sleep(0.01)
            run.ended = "left" if run.ended == "unanswered" else run.ended
        except BaseException as error:
            r.failed(run, error)

    with failing(r.rng, rate, r.events):
        clients = r.threads([client] * 3)
        with interrupts(r.rng, ctrl_c, r.events) if ctrl_c else nullcontext():
            client(r.rng)
        for thread in clients:
            thread.join()


def event_loops(r: Round, rate: float, ctrl_c: float) -> None:
    """Two event loops with clients that read, are slow, leave, are cancelled or time out, and a loop that vanishes."""
    llm = AsyncLLM(r.engine)

    async def client(rng: random.Random, job: Job) -> None:
        run, fate = r.run(rng, "async", job), rng.choice(["read"] * 8 + ["slow", "leave", "drop", "cancel", "abort"])
        leaves, options = rng.choice([0, 1, 5]), {}
        if rng.random() < 0.1:
            r.abort(run, "deadline")
            options = {"timeout": rng.random() * 0.1}
        await asyncio.sleep(rng.random() * 0.3)
        if rng.random() < 0.1:
            r.bad(rng, llm.generate)
        try:
            outputs = llm.generate(
                job.prompt, run.params(*processors(r, rng, run)), request_id=run.request_id, priority=job.priority,
                **options,
            )  # fmt: skip
            number = 0
            while not (fate in ("leave", "drop") and number == leaves):
                try:
                    output = await anext(outputs)
                except StopAsyncIteration:
                    break
                run.take(output)
                number += 1
                if fate == "abort" and number == 1:
                    r.abort(run, "abort(id)")
                    llm.abort(run.request_id)
                await asyncio.sleep(rng.random() * 0.05 if fate == "slow" else 0)
                if fate == "cancel" and number > leaves:
                    r.abort(run, "cancelled task")
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
            if run.ended == "unanswered":
                run.ended = "left"
                r.abort(run, "left loop" if fate == "leave" else "dropped iterator")
                if fate == "leave":
                    await outputs.aclose()
        except (asyncio.CancelledError, GeneratorExit) as error:  # the task is cancelled, or destroyed with its loop
            if is_injected(error):
                r.failed(run, error)
            else:
                run.ended = "left" if run.ended == "unanswered" else run.ended
                raise
        except BaseException as error:
            r.failed(run, error)

    def loop(vanishes: bool) -> Callable[[random.Random], None]:
        async def main(rng: random.Random) -> None:
            asyncio.get_running_loop().set_exception_handler(unhandled)
            tasks = [asyncio.create_task(client(rng, job)) for job in rng.choices(r.jobs, k=r.runs_each)]
            if vanishes:
                await asyncio.sleep(rng.random() * 0.5)
            else:
                await asyncio.gather(*tasks, return_exceptions=True)

        return lambda rng: _run(main(rng), vanishes and rng.random() < 0.5)

    def unhandled(_: Any, context: dict[str, Any]) -> None:
        if "destroyed but it is pending" not in context["message"]:
            r.wrong.append(f"an event loop has: {context}")

    with failing(r.rng, rate, r.events):
        for thread in r.threads([loop(False), loop(False), loop(True)]):
            thread.join()
    for run in r.runs.values():
        if run.face == "async" and run.ended == "unanswered":
            r.abort(run, "vanished loop")
            run.ended = "left"
    r.wrong += asyncio.run(_end(r, llm))


def _run(main: Coroutine[Any, Any, None], abruptly: bool) -> None:
    """Run `main`. abruptly: the loop is closed without a chance for its other tasks."""
    if not abruptly:
        asyncio.run(main)
        return
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main)
    finally:
        loop.close()


async def _end(r: Round, llm: AsyncLLM) -> list[str]:
    """Drained, asleep, awake, one more client in a loop of its own, and the end of the engine."""
    drained, stats = await llm.drain(30.0), llm.stats()
    r.events["steps"] += stats.steps
    r.events["preemptions"] += stats.scheduler.preemptions
    r.events["prefix hits, tokens"] += stats.scheduler.hit_tokens
    r.events["sleeps"] += 1
    await llm.sleep()
    await llm.wake_up()
    run = r.run(r.rng, "async", r.rng.choice(r.jobs))
    async for output in llm.generate(run.job.prompt, run.params(), request_id=run.request_id):
        run.take(output)
    wrong = settle(r.engine)
    await llm.close()
    return wrong + ([] if drained else ["drain did not end"]) + ([] if llm.closed else ["close did not close"])
