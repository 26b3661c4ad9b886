"""The scheduler, driven by a fake engine whose tokens depend on everything it reads from the pages."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from grok_engine.runtime.plan import StepPlan
from grok_engine.runtime.sequence import SequenceState, Status
from tests.engine.fake_engine import Engine
from tests.engine.invariants import check_scheduler

# Chunks and the budget


def counts(plan: StepPlan) -> list[tuple[int, int, int, int]]:
    return [(e.seq_id, e.start, len(e.token_ids), e.num_logits) for e in plan.entries]


def test_a_prompt_runs_in_chunks_and_samples_at_its_end() -> None:
    engine = Engine(20, budget=8)
    engine.prompt(*range(1, 20), max_new=2)
    assert [counts(engine.step()) for _ in range(4)] == [
        [(0, 0, 8, 0)],
        [(0, 8, 8, 0)],
        [(0, 16, 3, 1)],
        [(0, 19, 1, 1)],
    ]
    engine.run()
    assert engine.steps == 4


def test_decoding_goes_on_beside_the_chunks_of_a_prompt() -> None:
    engine = Engine(40, budget=8)
    for _ in range(3):
        engine.prompt(1, 2, max_new=9)
    engine.step()
    engine.prompt(*range(20), max_new=1)
    assert counts(engine.step()) == [(0, 2, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1), (3, 0, 5, 0)]
    engine.run()


def test_an_urgent_prompt_leaves_the_others_their_tokens() -> None:
    engine = Engine(40, budget=8)
    engine.prompt(1, 2, max_new=9)
    engine.step()
    engine.prompt(*range(20), max_new=1, priority=-1)
    assert counts(engine.step()) == [(1, 0, 7, 0), (0, 2, 1, 1)]
    engine.run()


def test_several_prompts_share_a_step() -> None:
    engine = Engine(40, budget=16)
    for length in (5, 6, 7):
        engine.prompt(*range(length))
    assert counts(engine.step()) == [(0, 0, 5, 1), (1, 0, 6, 1), (2, 0, 5, 0)]
    assert counts(engine.step())[2] == (2, 5, 2, 1)
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
    assert engine.scheduler.schedule() == StepPlan()
    engine.prompt(1)
    engine.run()


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    engine = Engine(4, page_size=4)
    with pytest.raises(ValueError, match="14 prompt tokens \\+ 4 new ones need 5 pages of 4 tokens, there are 4"):
        engine.scheduler.check_fits(SequenceState(0, list(range(14)), 4))
    engine.scheduler.check_fits(SequenceState(0, list(range(13)), 4))
    assert not engine.scheduler.has_work
    engine.prompt(*range(13))  # 13 + 4 - 1 = 16 tokens: the last one needs no place
    engine.run()


# Preemption


def test_the_latest_loses_its_pages_and_computes_its_tokens_again() -> None:
    engine = Engine(5, page_size=2, caching=False)
    a, b = engine.prompt(1, 2, max_new=7), engine.prompt(3, 4, max_new=7)
    while not b.preemptions:
        engine.step()
    assert engine.preempted == [b]
    assert (b.status, len(b.pages), b.num_computed) == (Status.WAITING, 0, 0)
    kept = list(b.output_ids)
    assert kept
    while b.status is Status.WAITING:
        assert b.output_ids == kept
        plan = engine.step()
    assert counts(plan)[-1] == (1, 0, 2 + len(kept), 1)
    engine.run()
    assert (a.preemptions, engine.scheduler.stats().preemptions) == (0, 1)


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    engine = Engine(9, page_size=2)
    engine.prompt(1, 2, max_new=14)
    b = engine.prompt(*range(3, 9), max_new=6)
    while not b.preemptions:
        engine.step()
    engine.scheduler.finish(engine.requests[0].seqs[0])
    engine.requests[0].aborted.append(engine.requests[0].seqs[0])
    (entry,) = engine.step().entries
    assert entry.seq_id == b.seq_id
    assert entry.start > 0
    assert b.cached_tokens == 0  # at its first admission
    engine.run()


def test_an_urgent_request_takes_the_seat_of_a_lesser_one() -> None:
    engine = Engine(40, seqs=2)
    a, b = engine.prompt(1, 2, priority=1), engine.prompt(3, 4, priority=1)
    engine.step()
    c = engine.prompt(5, 6, priority=0)
    engine.step()
    assert engine.preempted == [b]
    assert engine.scheduler.running == [c, a]
    engine.run()


def test_an_urgent_request_takes_pages_of_lesser_ones_but_not_in_vain() -> None:
    engine = Engine(12, page_size=1, caching=False)
    engine.prompt(1, 2, 3, 4, priority=0, max_new=3)
    low = engine.prompt(1, 2, 3, 4, priority=1, max_new=3)
    engine.step()
    engine.prompt(*range(10), priority=-1, max_new=2)  # would need the pages of both
    engine.step()
    assert len(engine.preempted) == 2
    engine.run()
    engine = Engine(12, page_size=1, caching=False)
    engine.prompt(1, 2, 3, 4, priority=0, max_new=3)
    low = engine.prompt(1, 2, 3, 4, priority=1, max_new=3)
    engine.step()
    engine.prompt(*range(10), priority=0, max_new=2)  # cannot have those of its equal
    engine.step()
    assert not engine.preempted
    assert low.preemptions == 0
    engine.run()


def test_equals_do_not_take_from_each_other() -> None:
    engine = Engine(40, seqs=1)
    engine.prompt(1, 2)
    engine.step()
    engine.prompt(3, 4)
    engine.step()
    assert not engine.preempted
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
        engine.step()
        assert not engine.preempted
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
    assert counts(engine.step()) == [(1, 8, 3, 1)]
    assert b.cached_tokens == 8
    engine.run()
    c = engine.prompt(*range(8), max_new=3)  # all of it known, but one token must give logits
    assert counts(engine.step()) == [(2, 4, 4, 1)]
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
    engine.run()


# Forks


def test_samples_share_the_prompt_and_copy_only_its_partly_filled_page() -> None:
    engine = Engine(40)
    engine.prompt(*range(6), max_new=4, samples=3)
    engine.step()
    a, b, c = engine.requests[0].seqs
    assert a.pages == b.pages == c.pages
    shared = list(a.pages)
    plan = engine.step()
    assert counts(plan) == [(0, 6, 1, 1), (1, 6, 1, 1), (2, 6, 1, 1)]
    assert [source for source, _ in plan.copies] == [shared[1]] * 2  # the last one keeps it
    assert {a.pages[0], b.pages[0], c.pages[0]} == {shared[0]}
    engine.run()
    assert engine.computed == 6 + 3 * 3


def test_a_fork_at_the_end_of_a_page_copies_nothing() -> None:
    engine = Engine(40)
    engine.prompt(*range(8), max_new=4, samples=3)
    engine.step()
    assert engine.step().copies == ()
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
    (b,) = engine.fork(a, 1)
    engine.requests[1].samples = 2
    check_scheduler(engine.scheduler)
    assert b.pages == a.pages[:2]
    assert counts(engine.step()) == [(1, 6, 9, 1), (2, 6, 5, 0)]  # the half filled page was copied for one
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
    plan = engine.scheduler.schedule()
    engine.abort(a)  # instead of a forward pass
    engine.scheduler.commit(plan)
    engine.prompt(*range(9))
    engine.run()


@pytest.mark.parametrize("seed", range(4))
def test_failed_steps_can_be_undone(seed: int) -> None:
    """By preempting the plan's sequences, whatever the forward pass left in the pages that it may write."""
    rng = random.Random(seed)
    engine = Engine(14, page_size=3, seqs=5, budget=12)
    scheduler, failed = engine.scheduler, 0
    for _ in range(60):
        prompt = [1] * rng.choice([0, 6]) + rng.choices(range(3), k=rng.randint(1, 9))
        engine.prompt(*prompt, max_new=rng.randint(1, 9), samples=rng.choice([1, 1, 3]), priority=rng.choice([0, 1]))
    while scheduler.has_work:
        if rng.random() < 0.3:
            plan = scheduler.schedule()
            for _, destination in plan.copies:
                engine.memory[destination] = [-1] * engine.size
            for entry in plan.entries:
                for position in range(entry.start, entry.start + len(entry.token_ids)):
                    engine.memory[entry.pages[position // engine.size]][position % engine.size] = -1
            scheduler._pending = None
            for entry in reversed(plan.entries):
                seq = engine.by_id(entry.seq_id)
                scheduler.running.remove(seq)
                scheduler._release(seq)
                scheduler._wait(seq)
            check_scheduler(scheduler)
            failed += 1
        engine.step()
    engine.check_end()
    assert failed > 20


# Cost


def lines_run(work: Callable[[], object]) -> int:
    """Lines of Python that a call executes: a cost that does not depend on the machine's load."""
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
