"""A stand-in for the engine: a model whose next token is a hash of what it reads back from its simulated pages."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from grok_engine.runtime.allocator import PageAllocator
from grok_engine.runtime.scheduler import Schedule, Scheduler, Sequence, Status

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
