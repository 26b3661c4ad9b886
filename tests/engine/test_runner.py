"""A step's plan: all that a forward pass needs, and nothing that is alive."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from grok_engine.runtime.plan import Entry, StepPlan
from grok_engine.runtime.runner import Runner
from grok_engine.runtime.sequence import SequenceState
from tests.engine.fake_engine import Engine
from tests.engine.test_invariance import SHAPES, SMALL, make_engine, make_traffic, run


@pytest.mark.parametrize("shape", ["few pages", "page of 3, chunks of 5 at most"])
def test_a_pickled_plan_gives_the_same_bits_on_another_runner(shape: str) -> None:
    """With forks, page copies, preemption, cached prefixes and scored prompts. Its pages start as NaN."""
    engine = make_engine(SMALL, "float32", "float32", **SHAPES[shape])
    other, plain = Runner(engine.model, engine.config), engine.runner.forward
    for pages in other.cache:
        pages.k.fill_(float("nan"))
        pages.v.fill_(float("nan"))
    plans: list[tuple[StepPlan, bytes]] = []

    def forward(plan: StepPlan, routed: list[torch.Tensor] | None = None) -> torch.Tensor:
        plans.append((plan, pickle.dumps(plan)))
        x_RD = plain(plan)
        found_RD = other.forward(pickle.loads(plans[-1][1]))
        assert x_RD.shape == (sum(e.num_logits for e in plan.entries), engine.config.model.d_model)
        assert torch.equal(found_RD, x_RD)
        return x_RD

    engine.runner.forward = forward  # type: ignore[method-assign]
    run(engine, make_traffic(31, 1024))
    assert engine.stats().scheduler.hit_tokens > 0
    assert any(plan.copies for plan, _ in plans)
    assert any(e.num_logits > 1 for plan, _ in plans for e in plan.entries)
    assert any(e.num_logits == 0 for plan, _ in plans for e in plan.entries)
    for plan, pickled in plans:  # all the steps after it left it as it was
        assert pickle.dumps(plan) == pickled


def test_rows_that_want_logits() -> None:
    plan = StepPlan(
        (Entry([5] * 4, 0, [0], 4), Entry([6] * 3, 2, [1]), Entry([7], 9, [2], 1), Entry([8] * 5, 0, [3], 2))
    )
    assert plan.logit_rows() == [0, 1, 2, 3, 7, 11, 12]
    assert StepPlan().logit_rows() == []


def test_forward_returns_those_rows() -> None:
    engine = make_engine(SMALL, "float32", "float32", num_pages=8, page_size=4)
    first, second = [5, 6, 7, 8], [9, 10, 11]
    x_TD = engine.runner.run([Entry(first, 0, [0]), Entry(second, 0, [1])]).clone()

    def forward(*num_logits: int) -> Any:
        numbers = iter(num_logits)
        entries = [Entry(first, 0, [0], next(numbers)), Entry(second, 0, [1], next(numbers))]
        return engine.runner.forward(StepPlan(tuple(entries)))

    assert torch.equal(forward(4, 3), x_TD)
    assert torch.equal(forward(2, 1), x_TD[[2, 3, 6]])
    assert torch.equal(forward(1, 0), x_TD[3:4])
    assert forward(0, 0).shape == (0, engine.config.model.d_model)


def test_a_scored_prompt_wants_logits_of_every_row_once() -> None:
    """In chunks, and not again where its tokens are computed again after a preemption."""
    engine = Engine(12, page_size=2, seqs=2, budget=6, caching=False)
    scheduler = engine.scheduler
    seq = SequenceState(0, list(range(10)), 8, logits_from=0)
    scheduler.add(seq)
    asked = []

    def step() -> None:
        plan = scheduler.schedule()
        scheduler.commit(plan)
        asked.extend((e.start, e.start + len(e.token_ids), e.num_logits) for e in plan.entries if e.seq_id == 0)
        for running in scheduler.running:
            if running.num_computed == running.length:
                running.output_ids.append(1)

    step()
    other = SequenceState(1, [1] * 18, 2, priority=-1)
    scheduler.add(other)  # takes the pages
    step()
    assert seq.preemptions == 1
    scheduler.finish(other)
    for _ in range(4):
        step()
    assert asked == [(0, 6, 6), (0, 6, 0), (6, 10, 4), (10, 11, 1), (11, 12, 1)]
