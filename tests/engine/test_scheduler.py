"""The scheduler driven as an engine drives it, with a model whose every token hangs on what it reads from the pages."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grok_engine.cache.allocator import PageAllocator
from grok_engine.scheduler import Schedule, Scheduler, Sequence, Status

SCALE = int(os.environ.get("GROK_TEST_SCALE", "1"))  # more examples, for a longer look
VOCAB = 5
END = 0


def key_of(before: int, position: int, token: int) -> int:
    """What a page holds for a token: like a key of a real model, it hangs on all tokens before."""
    return hash((before, position, token))


def next_token(keys: list[int], sample: int) -> int:
    return hash((*keys, sample)) % VOCAB


def alone(prompt: list[int], max_new: int, sample: int, ends: bool) -> list[int]:
    """What a request generates with nothing else in the world."""
    keys: list[int] = []
    for position, token in enumerate(prompt):
        keys.append(key_of(keys[-1] if keys else 0, position, token))
    output: list[int] = []
    while len(output) < max_new and not (ends and output and output[-1] == END):
        output.append(next_token(keys, sample))
        keys.append(key_of(keys[-1], len(keys), output[-1]))
    return output


@dataclass
class Request:
    prompt: list[int]
    max_new: int
    priority: int = 0
    samples: int = 1
    arrives: int = 0  # step
    abort_at: int | None = None  # steps after it arrives
    abort_inside: bool = False  # while the step runs
    abort_child: bool = False  # the last sample alone
    seqs: list[Sequence] = field(default_factory=list)
    aborted: list[Sequence] = field(default_factory=list)


class Engine:
    """The step loop, and pages of memory that hold keys."""

    def __init__(
        self,
        num_pages: int,
        page_size: int = 4,
        *,
        seqs: int = 8,
        budget: int = 16,
        length: int = 10_000,
        ends: bool = False,
        caching: bool = True,
        ageing: int = 1024,
    ) -> None:
        self.size, self.ends = page_size, ends
        self.allocator = PageAllocator(num_pages, page_size, caching)
        self.scheduler = Scheduler(
            self.allocator, max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=length, ageing=ageing
        )
        self.memory: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.requests: list[Request] = []
        self.owner: dict[Sequence, tuple[Request, int]] = {}
        self.admitted: list[Sequence] = []
        self.steps = 0
        self.computed = 0
        self.together = False  # copies: all read, then all written

    def add(self, request: Request) -> Sequence:
        seq = Sequence(len(self.owner), request.prompt, request.max_new, request.priority)
        self.scheduler.add(seq)
        request.seqs.append(seq)
        self.requests.append(request)
        self.owner[seq] = (request, 0)
        return seq

    def prompt(self, *tokens: int, max_new: int = 4, priority: int = 0, samples: int = 1) -> Sequence:
        return self.add(Request(list(tokens), max_new, priority, samples))

    def abort(self, seq: Sequence) -> None:
        if seq.status is not Status.FINISHED:
            self.owner[seq][0].aborted.append(seq)
        self.scheduler.abort(seq)
        assert seq.pages == []
        assert seq.status is Status.FINISHED
        self.scheduler.check()

    def read(self, seq: Sequence, position: int) -> int:
        value = self.memory[seq.pages[position // self.size]][position % self.size]
        assert value is not None, f"sequence {seq.seq_id} reads place {position}, never written"
        return value

    def forward(self, schedule: Schedule) -> dict[Sequence, int]:
        """Copies, then every key written, then every token from what is read: as layers do it."""
        destinations = [d for _, d in schedule.copies]
        assert len(set(destinations)) == len(destinations)
        if self.together:
            read = [list(self.memory[s]) for s, _ in schedule.copies]
            for d, page in zip(destinations, read, strict=True):
                self.memory[d] = page
        else:
            for s, d in schedule.copies:
                self.memory[d] = list(self.memory[s])
        live = [e for e in schedule.entries if e.seq.status is Status.RUNNING]  # others lost their pages in between
        written: set[int] = set()
        for entry in live:
            seq, mine = entry.seq, set()
            before = self.read(seq, entry.start - 1) if entry.start else 0
            tokens = seq.tokens(entry.start, entry.start + entry.count)
            assert tokens == seq.token_ids[entry.start : entry.start + entry.count]
            for position, token in enumerate(tokens, entry.start):
                page = seq.pages[position // self.size]
                assert self.allocator.writable(page), f"sequence {seq.seq_id} writes page {page}, which others read"
                mine.add(page)
                before = key_of(before, position, token)
                self.memory[page][position % self.size] = before
            assert not mine & written, "two sequences write one page"
            written |= mine
            self.computed += entry.count
        return {
            e.seq: next_token([self.read(e.seq, i) for i in range(e.start + e.count)], 0) for e in live if e.samples
        }

    def check_schedule(self, schedule: Schedule, waiting: list[Sequence], running: list[Sequence]) -> None:
        scheduler, entries = self.scheduler, schedule.entries
        assert sum(e.count for e in entries) <= scheduler.max_num_batched_tokens
        ranks = [e.seq.rank for e in entries]
        assert ranks == sorted(set(ranks)), "not in the order of urgency, or twice"
        for e in entries:
            assert e.count >= 1
            assert e.start == e.seq.num_computed
            assert e.samples == (e.start + e.count == e.seq.length)
        chosen = {e.seq for e in entries}
        for seq in running:  # whoever decodes is not held up by prompts
            if seq.status is Status.RUNNING and seq.length - seq.num_computed == 1:
                assert seq in chosen, f"sequence {seq.seq_id} decodes and got no token"
        admitted = [seq for seq in waiting if seq.status is Status.RUNNING]
        passed = [seq for seq in waiting if seq.status is Status.WAITING]
        assert max((s.rank for s in admitted), default=(-(10**9), 0)) < min(
            (s.rank for s in passed), default=(10**9, 0)
        )
        assert all(s.status is Status.WAITING for s in schedule.preempted), "thrown out and let in again in one step"
        # what was thrown out is less urgent than all that runs
        thrown = min((s.rank for s in schedule.preempted), default=(10**9, 0))
        assert all(s.rank < thrown for s in scheduler.running)
        self.admitted += [seq for seq in admitted if seq.preemptions == 0]

    def step(self, inside: Callable[[], None] | None = None) -> Schedule:
        """One step of an engine; `inside` is called while the forward pass would run."""
        scheduler = self.scheduler
        waiting = [seq for seq in self.owner if seq.status is Status.WAITING]
        running = list(scheduler.running)
        schedule = scheduler.schedule()
        scheduler.check()
        self.check_schedule(schedule, waiting, running)
        self.steps += 1
        if inside is not None:
            inside()
        logits = self.forward(schedule)
        scheduler.commit(schedule)
        scheduler.check()
        for seq in logits:
            request, _ = self.owner[seq]
            if request.samples > len(request.seqs) and not seq.output_ids:
                first = len(self.owner)
                for child in scheduler.fork(seq, range(first, first + request.samples - 1)):
                    self.owner[child] = (request, len(request.seqs))
                    request.seqs.append(child)
                    self.append(child, child)
                scheduler.check()
            self.append(seq, seq)
        scheduler.check()
        return schedule

    def append(self, seq: Sequence, reads: Sequence) -> None:
        request, sample = self.owner[seq]
        if not reads.pages:  # a child that has to wait: its parent's keys are the same
            reads = request.seqs[0]
        seq.output_ids.append(next_token([self.read(reads, i) for i in range(seq.length)], sample))
        if len(seq.output_ids) == request.max_new or (self.ends and seq.output_ids[-1] == END):
            self.scheduler.finish(seq)
            self.scheduler.finish(seq)  # again is no error

    def run(self, limit: int = 100_000) -> None:
        while self.scheduler.has_work:
            assert self.steps < limit, "no end"
            self.step()
        self.check_end()

    def check_end(self) -> None:
        for request in self.requests:
            for sample, seq in enumerate(request.seqs):
                assert seq.status is Status.FINISHED
                expected = alone(request.prompt, request.max_new, sample, self.ends)
                if seq in request.aborted:
                    expected = expected[: len(seq.output_ids)]
                assert seq.output_ids == expected, f"sequence {seq.seq_id} differs from when it runs alone"
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        assert stats.pages_free == self.allocator.num_pages
        self.allocator.check([])


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


# Chunks and the budget


def counts(schedule: Schedule) -> list[tuple[int, int, int, bool]]:
    return [(e.seq.seq_id, e.start, e.count, e.samples) for e in schedule.entries]


def test_a_prompt_runs_in_chunks_and_samples_at_its_end() -> None:
    engine = Engine(20, budget=8)
    engine.prompt(*range(1, 20), max_new=2)
    assert [counts(engine.step()) for _ in range(4)] == [
        [(0, 0, 8, False)],
        [(0, 8, 8, False)],
        [(0, 16, 3, True)],
        [(0, 19, 1, True)],
    ]
    engine.run()
    assert engine.steps == 4


def test_decoding_goes_on_beside_the_chunks_of_a_prompt() -> None:
    engine = Engine(40, budget=8)
    for _ in range(3):
        engine.prompt(1, 2, max_new=9)
    engine.step()
    engine.prompt(*range(20), max_new=1)
    assert counts(engine.step()) == [(0, 2, 1, True), (1, 2, 1, True), (2, 2, 1, True), (3, 0, 5, False)]
    engine.run()


def test_an_urgent_prompt_leaves_the_others_their_tokens() -> None:
    engine = Engine(40, budget=8)
    engine.prompt(1, 2, max_new=9)
    engine.step()
    engine.prompt(*range(20), max_new=1, priority=-1)
    assert counts(engine.step()) == [(1, 0, 7, False), (0, 2, 1, True)]
    engine.run()


def test_several_prompts_share_a_step() -> None:
    engine = Engine(40, budget=16)
    for length in (5, 6, 7):
        engine.prompt(*range(length))
    assert counts(engine.step()) == [(0, 0, 5, True), (1, 0, 6, True), (2, 0, 5, False)]
    assert counts(engine.step())[2] == (2, 5, 2, True)
    engine.run()


def test_no_more_run_than_max_num_seqs() -> None:
    engine = Engine(40, seqs=2)
    for _ in range(5):
        engine.prompt(1, 2, 3)
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.running, stats.waiting) == (2, 3)
    engine.run()


def test_without_work_a_step_is_empty() -> None:
    engine = Engine(4)
    assert not engine.scheduler.has_work
    assert engine.scheduler.schedule() == Schedule()
    engine.prompt(1)
    engine.run()


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    engine = Engine(4, page_size=4, length=30)
    with pytest.raises(ValueError, match="27 prompt tokens \\+ 4 new ones = 31, more than max_model_len=30"):
        engine.prompt(*range(27))
    with pytest.raises(ValueError, match="14 prompt tokens \\+ 4 new ones need 5 pages of 4 tokens, there are 4"):
        engine.prompt(*range(14))
    with pytest.raises(ValueError, match="0 prompt tokens and max_new_tokens=4"):
        engine.prompt()
    with pytest.raises(ValueError, match="1 prompt tokens and max_new_tokens=0"):
        engine.prompt(1, max_new=0)
    assert not engine.scheduler.has_work
    engine.prompt(*range(13))  # 13 + 4 - 1 = 16 tokens: the last one needs no place
    engine.run()


def test_bad_limits_are_refused_with_their_values() -> None:
    def build(**limits: int) -> Scheduler:
        sizes: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 8, **limits}
        return Scheduler(PageAllocator(4, 4), **sizes)

    for name in ("max_num_seqs", "max_model_len", "ageing"):
        with pytest.raises(ValueError, match=f"{name}=0 is not a positive"):
            build(**{name: 0})
    with pytest.raises(ValueError, match="max_num_batched_tokens=3 is less than max_num_seqs=4"):
        build(max_num_batched_tokens=3)


# Preemption


def test_the_latest_loses_its_pages_and_computes_its_tokens_again() -> None:
    engine = Engine(5, page_size=2, caching=False)
    a, b = engine.prompt(1, 2, max_new=7), engine.prompt(3, 4, max_new=7)
    while not b.preemptions:
        schedule = engine.step()
    assert schedule.preempted == [b]
    assert (b.status, b.pages, b.num_computed) == (Status.WAITING, [], 0)
    kept = list(b.output_ids)
    assert kept
    while b.status is Status.WAITING:
        assert b.output_ids == kept
        schedule = engine.step()
    assert counts(schedule)[-1] == (1, 0, 2 + len(kept), True)
    engine.run()
    assert (a.preemptions, engine.scheduler.stats().preemptions) == (0, 1)


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    engine = Engine(9, page_size=2)
    engine.prompt(1, 2, max_new=14)
    b = engine.prompt(*range(3, 9), max_new=6)
    while not b.preemptions:
        engine.step()
    engine.scheduler.abort(engine.requests[0].seqs[0])
    engine.requests[0].aborted.append(engine.requests[0].seqs[0])
    (entry,) = engine.step().entries
    assert entry.seq is b
    assert entry.start > 0
    assert b.cached_tokens == 0  # at its first admission
    engine.run()


def test_an_urgent_request_takes_the_seat_of_a_lesser_one() -> None:
    engine = Engine(40, seqs=2)
    a, b = engine.prompt(1, 2, priority=1), engine.prompt(3, 4, priority=1)
    engine.step()
    c = engine.prompt(5, 6, priority=0)
    assert engine.step().preempted == [b]
    assert engine.scheduler.running == [c, a]
    engine.run()


def test_an_urgent_request_takes_pages_of_lesser_ones_but_not_in_vain() -> None:
    engine = Engine(12, page_size=1, caching=False)
    engine.prompt(1, 2, 3, 4, priority=0, max_new=3)
    low = engine.prompt(1, 2, 3, 4, priority=1, max_new=3)
    engine.step()
    engine.prompt(*range(10), priority=-1, max_new=2)  # would need the pages of both
    schedule = engine.step()
    assert len(schedule.preempted) == 2
    engine.run()
    engine = Engine(12, page_size=1, caching=False)
    engine.prompt(1, 2, 3, 4, priority=0, max_new=3)
    low = engine.prompt(1, 2, 3, 4, priority=1, max_new=3)
    engine.step()
    engine.prompt(*range(10), priority=0, max_new=2)  # cannot have those of its equal
    assert not engine.step().preempted
    assert low.preemptions == 0
    engine.run()


def test_equals_do_not_take_from_each_other() -> None:
    engine = Engine(40, seqs=1)
    engine.prompt(1, 2)
    engine.step()
    engine.prompt(3, 4)
    assert not engine.step().preempted
    engine.run()
    assert engine.scheduler.preemptions == 0


def test_a_waiting_sample_does_not_take_the_seat_of_a_later_equal_but_goes_before_the_next() -> None:
    engine = Engine(40, seqs=2)
    engine.prompt(1, 2, samples=2, max_new=9)
    later = engine.prompt(3, 4, max_new=3)
    last = engine.prompt(5, 6)
    engine.step()
    child = engine.requests[0].seqs[1]
    assert child.status is Status.WAITING
    while later.status is Status.RUNNING:
        assert not engine.step().preempted
    engine.step()
    assert (child.status, last.status) == (Status.RUNNING, Status.WAITING)
    engine.run()


def test_admission_leaves_a_page_for_each_running_sequence() -> None:
    engine = Engine(6, page_size=2, caching=False)
    engine.prompt(1, 2, 3, max_new=3)
    engine.prompt(1, 2, 3, max_new=3)
    third = engine.prompt(1, 2, max_new=3)
    assert len(engine.step().entries) == 2  # one more page and none for the two: 4 + 1 + 2 > 6
    while third.status is Status.WAITING:
        engine.step()
    engine.run()
    assert engine.scheduler.preemptions == 0


# Prefixes


def test_a_repeated_prompt_computes_only_what_is_new() -> None:
    engine = Engine(40)
    engine.prompt(*range(11), max_new=3)
    engine.run()
    b = engine.prompt(*range(11), max_new=3)
    assert counts(engine.step()) == [(1, 8, 3, True)]
    assert b.cached_tokens == 8
    engine.run()
    c = engine.prompt(*range(8), max_new=3)  # all of it known, but one token must give logits
    assert counts(engine.step()) == [(2, 4, 4, True)]
    assert c.cached_tokens == 4
    engine.run()
    stats = engine.scheduler.stats()
    assert (stats.query_tokens, stats.hit_tokens) == (30, 12)


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    engine = Engine(40)
    a = engine.prompt(*range(5), max_new=8)
    engine.run()
    b = engine.prompt(*range(5), *a.output_ids, 9, 9)
    engine.step()
    assert b.cached_tokens == 12  # 5 + 8 tokens, the last of which was never computed
    engine.run()


def test_equal_prompts_at_once_end_up_on_the_same_pages() -> None:
    engine = Engine(40)
    a, b = engine.prompt(*range(8)), engine.prompt(*range(8))
    engine.step()
    assert a.pages[:2] == b.pages[:2]
    assert b.table_version > a.table_version
    engine.run()


def test_the_table_version_tells_when_pages_change() -> None:
    rng = random.Random(3)
    engine = Engine(30, seqs=6)
    seen: dict[Sequence, tuple[int, list[int]]] = {}
    for i in range(300):
        if i % 3 == 0:
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 12))]
            engine.prompt(*tokens, max_new=rng.randint(1, 20), samples=rng.choice([1, 3]))
        engine.step()
        for seq in engine.scheduler.running:
            version, pages = seen.get(seq, (-1, []))
            if version == seq.table_version:
                assert seq.pages[: len(pages)] == pages
            seen[seq] = (seq.table_version, list(seq.pages))
    engine.run()


# Forks


def test_samples_share_the_prompt_and_copy_only_its_partly_filled_page() -> None:
    engine = Engine(40)
    engine.prompt(*range(6), max_new=4, samples=3)
    engine.step()
    a, b, c = engine.requests[0].seqs
    assert a.pages == b.pages == c.pages
    shared = list(a.pages)
    schedule = engine.step()
    assert counts(schedule) == [(0, 6, 1, True), (1, 6, 1, True), (2, 6, 1, True)]
    assert [source for source, _ in schedule.copies] == [shared[1]] * 2  # the last one keeps it
    assert {a.pages[0], b.pages[0], c.pages[0]} == {shared[0]}
    engine.run()
    assert engine.computed == 6 + 3 * 3


def test_a_fork_at_the_end_of_a_page_copies_nothing() -> None:
    engine = Engine(40)
    engine.prompt(*range(8), max_new=4, samples=3)
    engine.step()
    assert engine.step().copies == []
    engine.run()


def test_samples_beyond_max_num_seqs_wait_and_find_the_prompt() -> None:
    engine = Engine(40, seqs=2)
    engine.prompt(*range(9), max_new=4, samples=5)
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.running, stats.waiting) == (2, 3)
    engine.run()
    assert engine.scheduler.stats().hit_tokens == 3 * 8


def test_a_fork_in_the_middle_of_a_prompt() -> None:
    engine = Engine(40, budget=14, seqs=2)
    engine.prompt(*range(20, 28), max_new=1)
    a = engine.prompt(*range(15), max_new=3)  # six of them fit beside
    engine.step()
    assert a.num_computed == 6
    (b,) = engine.scheduler.fork(a, [2])
    engine.owner[b] = (engine.requests[1], 1)
    engine.requests[1].seqs.append(b)
    engine.requests[1].samples = 2
    engine.scheduler.check()
    assert b.pages == a.pages[:2]
    assert counts(engine.step()) == [(1, 6, 9, True), (2, 6, 5, False)]  # the half filled page was copied for one
    engine.run()


# Aborts


def test_abort_in_every_state() -> None:
    engine = Engine(6, page_size=2, seqs=3, caching=False)
    a, b = engine.prompt(1, 2, max_new=9), engine.prompt(3, 4, max_new=9)
    c = engine.prompt(5, 6, 7, 8, 9, 10, max_new=1)
    engine.abort(c)  # waiting
    while not b.preemptions:
        engine.step()
    engine.abort(b)  # preempted
    engine.abort(a)  # running
    engine.abort(a)  # finished
    assert engine.scheduler.stats().pages_used == 0
    d = engine.prompt(1, 2, 3, max_new=9, samples=3)
    engine.step()
    _, e, f = engine.requests[-1].seqs
    engine.abort(e)  # forked, its partly filled page shared
    engine.step(lambda: engine.abort(d))  # while the step runs
    assert engine.scheduler.running == [f]
    engine.run()


def test_a_failed_step_can_be_given_up() -> None:
    engine = Engine(20)
    a = engine.prompt(*range(9))
    schedule = engine.scheduler.schedule()
    engine.abort(a)  # instead of a forward pass
    engine.scheduler.commit(schedule)
    engine.prompt(*range(9))
    engine.run()


def test_aborted_requests_do_not_pile_up_in_the_queue() -> None:
    engine = Engine(4)
    for i in range(5000):
        engine.scheduler.abort(engine.prompt(1, 2, priority=i))
    assert len(engine.scheduler._heap) <= 64


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


# Cost


def lines_run(work: Callable[[], object]) -> int:
    """Lines of Python that a call executes: a cost that no load on the machine moves."""
    lines = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("cause", ["seats", "pages"])
def test_a_long_queue_costs_a_step_nothing(cause: str) -> None:
    def cost(waiting: int) -> int:
        engine = Engine(8 if cause == "pages" else 64, seqs=2 if cause == "seats" else 8)
        for i in range(2):
            engine.prompt(*range(1, 10 + i), max_new=6)
        engine.step()
        for _ in range(waiting):
            engine.prompt(*range(1, 9), max_new=4)
        scheduler = engine.scheduler
        scheduler.commit(scheduler.schedule())
        for seq in scheduler.running:
            seq.output_ids.append(1)
        return lines_run(scheduler.schedule)

    assert cost(5000) == cost(5)
