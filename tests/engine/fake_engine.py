"""A fake engine over the real scheduler: its next token is a hash of all keys read back from simulated pages."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from grok_engine.runtime.allocator import PageAllocator
from grok_engine.runtime.plan import StepPlan
from grok_engine.runtime.scheduler import Scheduler
from grok_engine.runtime.sequence import SequenceState, Status
from tests.engine.invariants import check_allocator, check_scheduler, is_writable

SCALE = int(os.environ.get("GROK_TEST_SCALE", "1"))  # more examples, for a longer look
VOCAB = 5
END = 0


def key_of(before: int, position: int, token: int) -> int:
    """What a page holds for a token. Like a real key, it depends on all tokens before."""
    return hash((before, position, token))


def next_token(keys: list[int], sample: int) -> int:
    return hash((*keys, sample)) % VOCAB


def alone(prompt: list[int], max_new: int, sample: int, ends: bool) -> list[int]:
    """What a request generates alone."""
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
    seqs: list[SequenceState] = field(default_factory=list)
    aborted: list[SequenceState] = field(default_factory=list)


class Engine:
    """The step loop, and pages of memory that hold keys."""

    def __init__(
        self,
        num_pages: int,
        page_size: int = 4,
        *,
        seqs: int = 8,
        budget: int = 16,
        ends: bool = False,
        caching: bool = True,
        ageing: int = 1024,
    ) -> None:
        self.size, self.ends = page_size, ends
        self.allocator = PageAllocator(num_pages, page_size, caching)
        self.scheduler = Scheduler(self.allocator, max_num_seqs=seqs, max_num_batched_tokens=budget, ageing=ageing)
        self.memory: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.requests: list[Request] = []
        self.owner: dict[SequenceState, tuple[Request, int]] = {}
        self.seqs: list[SequenceState] = []  # by seq_id
        self.admitted: list[SequenceState] = []
        self.preempted: list[SequenceState] = []  # by the last step
        self.steps = 0
        self.computed = 0
        self.together = False  # copies: all read, then all written

    def add(self, request: Request) -> SequenceState:
        seq = SequenceState(len(self.seqs), request.prompt, request.max_new, request.priority)
        self.scheduler.add(seq)
        self.seqs.append(seq)
        request.seqs.append(seq)
        self.requests.append(request)
        self.owner[seq] = (request, 0)
        return seq

    def prompt(self, *tokens: int, max_new: int = 4, priority: int = 0, samples: int = 1) -> SequenceState:
        return self.add(Request(list(tokens), max_new, priority, samples))

    def abort(self, seq: SequenceState) -> None:
        if seq.status is not Status.FINISHED:
            self.owner[seq][0].aborted.append(seq)
        self.scheduler.finish(seq)
        assert not seq.pages
        assert seq.status is Status.FINISHED
        check_scheduler(self.scheduler)

    def read(self, pages: Sequence[int], position: int) -> int:
        value = self.memory[pages[position // self.size]][position % self.size]
        assert value is not None, f"place {position} in {list(pages)} is read, never written"
        return value

    def by_id(self, seq_id: int) -> SequenceState:
        return self.seqs[seq_id]

    def forward(self, plan: StepPlan) -> dict[SequenceState, int]:
        """Copies, then every key written, then every token from what is read, as layers do it."""
        destinations = [d for _, d in plan.copies]
        assert len(set(destinations)) == len(destinations)
        if self.together:
            read = [list(self.memory[s]) for s, _ in plan.copies]
            for d, page in zip(destinations, read, strict=True):
                self.memory[d] = page
        else:
            for s, d in plan.copies:
                self.memory[d] = list(self.memory[s])
        live = [e for e in plan.entries if self.by_id(e.seq_id).status is Status.RUNNING]  # others lost their pages
        written: set[int] = set()
        for entry in live:
            mine = set()
            before = self.read(entry.pages, entry.start - 1) if entry.start else 0
            for position, token in enumerate(entry.token_ids, entry.start):
                page = entry.pages[position // self.size]
                assert is_writable(self.allocator, page), (
                    f"sequence {entry.seq_id} writes page {page}, which others read"
                )
                mine.add(page)
                before = key_of(before, position, token)
                self.memory[page][position % self.size] = before
            assert not mine & written, "two sequences write one page"
            written |= mine
            self.computed += len(entry.token_ids)
        return {
            self.by_id(e.seq_id): next_token([self.read(e.pages, i) for i in range(e.start + len(e.token_ids))], 0)
            for e in live
            if e.num_logits
        }

    def check_plan(self, plan: StepPlan, waiting: list[SequenceState], running: list[SequenceState]) -> None:
        scheduler, entries = self.scheduler, plan.entries
        assert sum(len(e.token_ids) for e in entries) <= scheduler.max_num_batched_tokens
        chosen = [self.by_id(e.seq_id) for e in entries]
        ranks = [seq.rank for seq in chosen]
        assert ranks == sorted(set(ranks)), "not in the order of urgency, or twice"
        for seq, e in zip(chosen, entries, strict=True):
            stop = e.start + len(e.token_ids)
            assert stop > e.start
            assert e.token_ids == (seq.prompt_ids + seq.output_ids)[e.start : stop]
            assert list(e.pages) == list(seq.pages)
            assert e.start == seq.num_computed
            assert e.num_logits == (stop == seq.length)
        for seq in running:  # whoever decodes is not held up by prompts
            if seq.status is Status.RUNNING and seq.length - seq.num_computed == 1:
                assert seq in chosen, f"sequence {seq.seq_id} decodes and got no token"
        admitted = [seq for seq in waiting if seq.status is Status.RUNNING]
        passed = [seq for seq in waiting if seq.status is Status.WAITING]
        assert max((s.rank for s in admitted), default=(-(10**9), 0)) < min(
            (s.rank for s in passed), default=(10**9, 0)
        )
        assert all(s.status is Status.WAITING for s in self.preempted), "preempted and admitted again in one step"
        # what was preempted is less urgent than all that runs
        preempted = min((s.rank for s in self.preempted), default=(10**9, 0))
        assert all(s.rank < preempted for s in scheduler.running)
        self.admitted += [seq for seq in admitted if seq.preemptions == 0]

    def step(self, inside: Callable[[], None] | None = None) -> StepPlan:
        """One step of an engine; `inside` is called while the forward pass would run."""
        scheduler = self.scheduler
        waiting = [seq for seq in self.owner if seq.status is Status.WAITING]
        running = list(scheduler.running)
        before = {seq: seq.preemptions for seq in running}
        plan = scheduler.schedule()
        self.preempted = [seq for seq in running if seq.preemptions > before[seq]]
        check_scheduler(scheduler)
        self.check_plan(plan, waiting, running)
        self.steps += 1
        if inside is not None:
            inside()
        logits = self.forward(plan)
        scheduler.commit(plan)
        check_scheduler(scheduler)
        for seq in logits:
            request, _ = self.owner[seq]
            if request.samples > len(request.seqs) and not seq.output_ids:
                for child in self.fork(seq, request.samples - 1):
                    self.append(child, child)
                check_scheduler(scheduler)
            self.append(seq, seq)
        check_scheduler(scheduler)
        return plan

    def fork(self, seq: SequenceState, count: int) -> list[SequenceState]:
        request, _ = self.owner[seq]
        children = []
        for _ in range(count):
            child = SequenceState(len(self.seqs), seq.prompt_ids, seq.max_new_tokens, seq.priority)
            self.owner[child] = (request, len(request.seqs))
            request.seqs.append(child)
            self.seqs.append(child)
            self.scheduler.fork(seq, child)
            children.append(child)
        return children

    def append(self, seq: SequenceState, reads: SequenceState) -> None:
        request, sample = self.owner[seq]
        if not reads.pages:  # a child that has to wait: its parent's keys are the same
            reads = request.seqs[0]
        seq.output_ids.append(next_token([self.read(reads.pages, i) for i in range(seq.length)], sample))
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
        check_allocator(self.allocator, [])
