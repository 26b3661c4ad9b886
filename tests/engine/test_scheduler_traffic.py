"""The scheduler under random traffic, and its fairness."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grok_engine.runtime.scheduler import Status
from tests.engine.fake_engine import SCALE, Engine, Request

# The simulation

requests = st.builds(
    lambda number, length, **kw: Request(prompt=[number >> i & 1 for i in range(length)], **kw),
    number=st.sampled_from([0, 0, 1, 2, 3, 1 << 9, 5 << 10]),
    length=st.integers(1, 30),
    max_new=st.integers(1, 12),
    priority=st.integers(-1, 1),
    samples=st.sampled_from([1, 1, 1, 2, 4]),
    arrives=st.integers(0, 25),
    abort_at=st.sampled_from([None, None, None, 0, 1, 2, 5, 9]),
    abort_inside=st.booleans(),
    abort_child=st.booleans(),
)


def play(engine: Engine, plan: list[Request]) -> None:
    """Requests arrive, some are aborted; until all have ended."""
    clock = 0
    limit = 130 + 30 * sum((len(r.prompt) + r.max_new) * r.samples for r in plan)
    coming = sorted(plan, key=lambda r: r.arrives)
    while coming or engine.scheduler.has_work:
        assert clock < limit, "no end"
        while coming and coming[0].arrives <= clock:
            engine.add(coming.pop(0))
        leaving = [r for r in engine.requests if r.abort_at is not None and clock >= r.arrives + r.abort_at]

        def leave(inside: bool, leaving: list[Request] = leaving) -> None:
            for r in leaving:
                if r.abort_inside == inside and not r.aborted:
                    for seq in r.seqs[-1:] if r.abort_child else list(r.seqs):
                        engine.abort(seq)

        leave(inside=False)
        engine.step(lambda leave=leave: leave(inside=True))  # type: ignore[misc]
        clock += 1
    engine.check_end()


@settings(max_examples=1500 * SCALE, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    plan=st.lists(requests, min_size=1, max_size=14),
    page_size=st.integers(1, 5),
    spare=st.integers(0, 12),
    seqs=st.integers(1, 6),
    extra=st.integers(0, 12),
    ageing=st.sampled_from([1, 3, 1024]),
    caching=st.sampled_from([True, True, False]),
    ends=st.booleans(),
    together=st.booleans(),
)
def test_every_request_ends_with_the_tokens_it_has_alone(
    plan: list[Request],
    page_size: int,
    spare: int,
    seqs: int,
    extra: int,
    ageing: int,
    caching: bool,
    ends: bool,
    together: bool,
) -> None:
    for r in plan:  # a plan is played again while it shrinks
        r.seqs, r.aborted = [], []
    fits = max(-(-(len(r.prompt) + r.max_new - 1) // page_size) for r in plan)
    engine = Engine(fits + spare, page_size, seqs=seqs, budget=seqs + extra, ageing=ageing, caching=caching, ends=ends)
    engine.together = together
    play(engine, plan)


@pytest.mark.parametrize("seed", range(8))
def test_a_long_crowded_run(seed: int) -> None:
    """Few pages for many requests: thousands of steps with preemptions, forks and shared prefixes in one life."""
    rng = random.Random(seed)
    plan = [
        Request(
            prompt=[1] * rng.choice([0, 8, 21]) + [rng.randrange(3) for _ in range(rng.randint(1, 20))],
            max_new=rng.randint(1, 40),
            priority=rng.choice([0, 0, 0, 1, 2]),
            samples=rng.choice([1, 1, 1, 3]),
            arrives=rng.randrange(600 * SCALE),
            abort_at=rng.choice([None, None, None, None, 3, 20]),
            abort_inside=rng.random() < 0.5,
            abort_child=rng.random() < 0.5,
        )
        for _ in range(400 * SCALE)
    ]
    engine = Engine(rng.choice([20, 26, 32]), rng.choice([4, 5]), seqs=8, budget=24, ageing=8, ends=seed % 2 == 0)
    play(engine, plan)
    stats = engine.scheduler.stats()
    assert stats.preemptions > 15
    assert stats.hit_tokens > 500


# Fairness


def test_less_urgent_requests_come_later_and_equals_in_order() -> None:
    engine = Engine(40, seqs=1)
    ids = [engine.prompt(1, priority=p, max_new=1).seq_id for p in (2, 0, 1, 0, 2, 1)]
    engine.run()
    assert [seq.seq_id for seq in engine.admitted] == [ids[i] for i in (1, 3, 2, 5, 0, 4)]


@settings(max_examples=200 * SCALE, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=60),
    ageing=st.integers(1, 12),
    seqs=st.integers(1, 3),
    pages=st.integers(4, 8),
)
def test_none_is_overtaken_by_more_than_ageing_allows(
    arrivals: list[tuple[int, int, int]], ageing: int, seqs: int, pages: int
) -> None:
    """Two requests arrive a step, more than can be served."""
    engine = Engine(pages, seqs=seqs, budget=seqs + 6, ageing=ageing)
    for i, (priority, length, max_new) in enumerate(arrivals):
        engine.prompt(*range(length), priority=priority, max_new=max_new)
        if i % 2:
            engine.step()
    engine.run()
    place = {seq: i for i, seq in enumerate(engine.admitted)}
    for seq in engine.owner:
        if seq in place:  # first admitted in a step that did not throw it out again
            overtakers = [o for o in place if o.arrival > seq.arrival and place[o] < place[seq]]
            for o in overtakers:
                assert o.arrival - seq.arrival < ageing * (seq.priority - o.priority)


def test_a_steady_load_of_urgent_requests_starves_nobody() -> None:
    engine = Engine(6, page_size=2, seqs=2, budget=4, ageing=20)
    engine.prompt(1, 2, 3)
    late = engine.prompt(4, 5, 6, priority=1)
    last = engine.prompt(7, 8, 9, priority=3)
    ended = []
    for i in range(400):  # an arrival a step, a service of many: the queue only grows
        engine.prompt(i, i, i, max_new=3)
        engine.step()
        ended.append((late.status is Status.FINISHED, last.status is Status.FINISHED))
    assert engine.scheduler.stats().waiting > 100
    assert ended[-1] == (True, True)
    assert late.arrival + 20 >= sum(s.arrival > late.arrival for s in engine.admitted[: engine.admitted.index(late)])
    engine.run()
