"""A server among clients that leave, stall, trickle and talk nonsense: no wrong token, and nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from grok_engine import AsyncLLM, LLMEngine, SamplingParams
from grok_engine.server import Limits, create_app, run
from grok_engine.server.completions import Completions
from grok_engine.server.service import AT_ONCE
from tests.server.chaos import PATIENCE, UNREAD, Case, honest, storm

MORE = bool(os.environ.get("GROK_TEST_MORE"))
CONNECTIONS, ROUNDS = (1000, 3) if MORE else (90, 2)
PROMPTS = ["My dear Watson,", "It was in the spring of the year", "x", "Café — naïve \u2028 日本"]


def draw_cases(llm: LLMEngine, seed: int) -> list[Case]:
    """Requests with the answers that they get alone."""
    rng, cases = random.Random(seed), []
    for prompt in PROMPTS * 3:
        options = {"max_tokens": rng.choice([3, 9, 24]), "seed": rng.randrange(1000), "temperature": 1.0}
        cases.append(Case({"prompt": prompt, **options, "ignore_eos": True, "stream": True, "return_token_ids": True}))
        llm.add_request(str(len(cases) - 1), prompt, SamplingParams(**options, ignore_eos=True))
        answer = None
        while llm.has_unfinished_requests():
            answer = llm.step()[0].outputs[0]
        assert answer is not None
        cases[-1] = Case(cases[-1].body, answer.text, list(answer.token_ids))
    return cases


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


async def settled(llm: AsyncLLM, tasks: int, fds: int) -> str:
    """What is left of the requests, once nothing changes any more: empty if nothing is."""
    left = ""
    for _ in range(int(PATIENCE / 0.05)):
        gc.collect(0)
        s = llm.stats().scheduler
        found = {
            "requests": llm.stats().requests, "running": s.running, "waiting": s.waiting, "pages": s.pages_used,
            "tasks": len(asyncio.all_tasks()) - tasks, "handles": handles() - fds,
        }  # fmt: skip
        left = str({name: count for name, count in found.items() if count > 0} or "")
        if not left:
            break
        await asyncio.sleep(0.05)
    return left


async def serve_through(llm: AsyncLLM, cases: list[Case]) -> None:
    app = create_app(llm, limits=Limits(max_body_bytes=65536, body_seconds=1.0))
    on = run.listen("127.0.0.1", 0)
    on.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # a slow reader stops the server soon
    port = on.getsockname()[1]
    server = asyncio.ensure_future(run._serve(llm, app, on, drain_seconds=10))
    await asyncio.sleep(0.2)
    try:
        await honest(port, cases[0], random.Random())
        await settled(llm, tasks=10, fds=handles())
        tasks, fds, peaks = len(asyncio.all_tasks()), handles(), []
        for seed in range(ROUNDS):
            before = llm.stats().generated_tokens
            await storm(port, cases, CONNECTIONS, seed)
            assert await settled(llm, tasks, fds) == ""
            # a third has left: what they asked for was not generated
            assert llm.stats().generated_tokens - before < CONNECTIONS // 3 * UNREAD / 3
            for case in cases:
                await honest(port, case, random.Random())
            peaks.append(rss_bytes())
        assert peaks[-1] - peaks[0] < 32 << 20, peaks
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(server, PATIENCE)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_storm_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(run, "STALL_SECONDS", 20.0)
    # few pages and a short queue: sequences are preempted, prefixes evicted, requests refused and sent again
    engine = LLMEngine("tiny", max_num_seqs=32, num_pages=48, page_size=16, max_waiting=CONNECTIONS // 4)
    cases = draw_cases(engine, seed=5)
    llm = AsyncLLM(engine)
    asyncio.run(serve_through(llm, cases))
    assert llm.closed


def test_requests_that_come_at_once_leave_turns_of_the_loop_to_others() -> None:
    async def main() -> None:
        tasks = [asyncio.ensure_future(route._take_turn()) for _ in range(5 * AT_ONCE)]
        counts = [0]
        for _ in range(30):
            await asyncio.sleep(0)
            counts.append(sum(task.done() for task in tasks))
        assert max(after - before for before, after in pairwise(counts)) == AT_ONCE
        assert counts[-1] == len(tasks)

    route = Completions(cast(Any, None))  # no model takes part
    asyncio.run(main())
    asyncio.run(main())  # in another loop
