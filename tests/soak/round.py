"""One engine under test: its clients' runs, the fates that processors bring, and what an idle engine still holds."""

from __future__ import annotations

import gc
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor

from grok_engine import LLM, LLMEngine, QueueFullError, RequestOutputKind, SamplingParams
from tests.engine.invariants import check_scheduler

from .chaos import ERRORS, OTHERS, is_injected, meddler, raiser, refused
from .report import Tally
from .traffic import Job, Run
from .world import LONGEST

BAD: list[tuple[Any, dict[str, Any]]] = [  # what every face must refuse at the call
    ([], {}), ([10**6], {}), ([5] * (LONGEST + 1), {}), (None, {}), ("x" * 10**6, {}), ({"text": "x"}, {}),
    ([5], {"n": 10**6}), ([5], {"logprobs": 10**6}), ([5], {"logit_bias": {10**6: 1.0}}), ([5], {"stop": "x" * 10**6}),
]  # fmt: skip


@dataclass
class Round:
    """One engine and its jobs, the runs of all its clients, and what went wrong."""

    rng: random.Random
    llm: LLM
    jobs: list[Job]
    runs_each: int  # of each client
    tally: Tally
    runs: dict[str, Run] = field(default_factory=dict)  # by request id
    logits: list[tuple[Job, Tensor]] = field(default_factory=list)  # that `LLM.logits` gave of a job's prompt
    wrong: list[str] = field(default_factory=list)
    lost: int = 0  # runs that Ctrl-C may have left without an answer: it can meet the return of `step`
    _serial: count[int] = field(default_factory=count)

    @property
    def events(self) -> Counter[str]:
        return self.tally.events

    @property
    def engine(self) -> LLMEngine:
        return self.llm.engine

    def run(self, rng: random.Random, face: str, job: Job, *kinds: RequestOutputKind) -> Run:
        run = Run(job, face, f"{face} {next(self._serial)}", rng.choice(kinds or list(RequestOutputKind)))
        self.runs[run.request_id] = run
        return run

    def abort(self, run: Run, by: str) -> None:
        """Mark a run as aborted, before it is."""
        self.events[f"aborted by: {by}"] += 1
        run.fate = "abort" if run.fate == "finish" else run.fate

    def failed(self, run: Run, error: BaseException) -> None:
        run.ended = "raised"
        if isinstance(error, QueueFullError):
            run.ended = "refused"
            self.events["refused: queue full"] += 1
        elif not is_injected(error):
            run.wrong.append(f"raised {error!r}")

    def bad(self, rng: random.Random, call: Callable[[Any, SamplingParams], Any]) -> None:
        prompt, options = rng.choice(BAD)
        self.events["refused: bad"] += 1
        if what := refused(lambda: call(prompt, SamplingParams(**options)), (ValueError, QueueFullError)):
            self.wrong.append(f"{prompt!r:.60} with {options!r:.60} {what}")

    def threads(self, clients: list[Callable[[random.Random], None]]) -> list[threading.Thread]:
        """Started threads, one a client, each with random numbers of its own. What one raises is wrong."""

        def guarded(client: Callable[[random.Random], None], seed: int) -> None:
            try:
                client(random.Random(seed))
            except BaseException as error:
                self.wrong.append(f"a client died: {error!r}")

        threads = [
            threading.Thread(target=guarded, args=(client, self.rng.randrange(2**63)), name="soak-client")
            for client in clients
        ]
        for thread in threads:
            thread.start()
        return threads


def processors(r: Round, rng: random.Random, run: Run) -> list[Any]:
    """Logits processors of a fate that comes from one: none, for most runs."""
    engine = r.engine

    def at(place: int, act: Callable[[], None]) -> Callable[[list[int], Tensor], Tensor]:
        def process(token_ids: list[int], logits_V: Tensor) -> Tensor:
            if len(token_ids) == place:
                act()
            return logits_V

        return process

    def abort() -> None:
        victim = run if rng.random() < 0.5 else rng.choice(list(r.runs.values()))
        if victim.face == run.face == "engine" and victim.ended == "unanswered":
            r.abort(victim, "processor")
            engine.abort_request(victim.request_id)

    fate = rng.random()
    if fate < 0.05:
        return [raiser(rng, [*ERRORS], r.events)]
    if fate < 0.06:
        return [raiser(rng, OTHERS, r.events)]
    if fate < 0.10:
        return [meddler(r.llm, r.wrong, r.events)]
    if fate < 0.16:
        return [at(rng.choice([0, 2]), abort)]
    return []


def settle(engine: LLMEngine) -> list[str]:
    """What an idle engine still holds."""
    gc.collect()  # streams that were left in cycles
    stats = engine.stats()
    wrong = [
        f"idle, and {name}={value}"
        for name, value in (
            ("requests", stats.requests), ("running", stats.scheduler.running), ("waiting", stats.scheduler.waiting),
            ("pages_used", stats.scheduler.pages_used),
        ) if value
    ]  # fmt: skip
    if engine.has_unfinished_requests():
        wrong.append("idle, with something to compute or to return")
    try:
        check_scheduler(engine.scheduler)
    except AssertionError as error:
        wrong.append(f"scheduler: {error}")
    return wrong
