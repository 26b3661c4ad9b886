"""Which tokens run next: continuous batching over sequences, in pages. No torch.

Urgency is one fixed rank a sequence: priority · `ageing` + its arrival, the lowest first. Within a priority that is the
order of arrival. Across priorities it is ageing: all that wait grow older at the same pace, so that ageing never
changes their order and the rank need not either. A request can be overtaken by at most `ageing` later ones for each
level that separates the two, and so waits forever under no load.

The rank decides everything: who is offered tokens first, who is admitted next (nothing passes a waiting sequence of a
lower rank), and who loses its pages when they run out (the highest). The lowest rank of all therefore always advances:
whatever others hold can be taken from them or comes free, and `add` refuses what would not fit alone.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush
from itertools import count, takewhile

from .allocator import PageAllocator

Rank = tuple[int, int]


class Status(Enum):
    WAITING = "waiting"  # new, or preempted; holds no page
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what was generated after it. The caller appends to `output_ids`; the rest is the scheduler's.

    `pages` only grows at its end while `table_version` stays the same.
    """

    seq_id: int
    prompt_ids: list[int]
    max_new_tokens: int
    priority: int = 0  # the lower, the more urgent
    output_ids: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    arrival: int = -1
    rank: Rank = (0, -1)
    num_computed: int = 0  # tokens whose keys and values are in `pages`
    pages: list[int] = field(default_factory=list)
    num_registered: int = 0  # full pages already offered to the prefix index
    use_cache: bool = True  # take pages of the prefix index
    cached_tokens: int = 0  # of the prompt, found in the prefix index when it was first admitted
    preemptions: int = 0
    table_version: int = 0
    _table: array[int] = field(default_factory=lambda: array("i"), repr=False)
    _table_seen: int = 0  # the version that `_table` is of

    @property
    def table(self) -> array[int]:
        """`pages`, kept as an array that grows with them: a step turns none but the new ones into numbers."""
        if self._table_seen != self.table_version:
            self._table, self._table_seen = array("i"), self.table_version
        if (known := len(self._table)) < len(self.pages):
            self._table.fromlist(self.pages[known:])
        return self._table

    @property
    def length(self) -> int:
        """Tokens known so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> list[int]:
        """All tokens known so far, as a new list."""
        return self.prompt_ids + self.output_ids

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop without building the others."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.output_ids[start - prompt : stop - prompt]
        return self.prompt_ids[start:stop] + self.output_ids[: max(stop - prompt, 0)]


@dataclass(slots=True)
class Entry:
    """Compute `count` tokens of `seq` from `start` on. `samples`: the last of them gives the logits of the next one."""

    seq: Sequence
    start: int
    count: int
    samples: bool


@dataclass(slots=True)
class Schedule:
    """One step. `copies` (source, destination) come before anything is written: in order, or all read then all written.

    The entries are in the order of urgency.
    """

    entries: list[Entry] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Sequences and pages now, and counts since the start. `hit_tokens` of `query_tokens` needed no computing."""

    running: int
    waiting: int
    pages_used: int
    pages_free: int  # the cached ones among them
    pages_cached: int
    query_tokens: int
    hit_tokens: int
    evictions: int
    preemptions: int


class Scheduler:
    """Shares a token budget a step, and the allocator's pages, among sequences. All of the pages are its own.

    One step is `schedule`, the forward pass, `commit`, and then for each entry that samples: optionally `fork`, append
    a token to the sequence, and `finish` it where that was the last. Prompts run in chunks beside the decoding ones,
    each of which gets its one token first.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        ageing: int = 1024,
    ) -> None:
        for name, value in (("max_num_seqs", max_num_seqs), ("max_model_len", max_model_len), ("ageing", ageing)):
            if value < 1:
                raise ValueError(f"{name}={value} is not a positive integer")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={max_num_batched_tokens} is less than max_num_seqs={max_num_seqs}: "
                "expected at least one token a step for each running sequence"
            )
        self.allocator, self.max_model_len, self.ageing = allocator, max_model_len, ageing
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.running: list[Sequence] = []  # by rank
        self.preemptions = self.query_tokens = self.hit_tokens = 0
        self._heap: list[tuple[Rank, Sequence]] = []  # the waiting, and finished ones not yet taken out
        self._num_waiting = 0
        self._serial = count()
        self._pending: Schedule | None = None  # scheduled, not committed
        self._blocked: tuple[Sequence, int, int] | None = None  # not admitted, at so many pages and running sequences

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._num_waiting)

    def stats(self) -> SchedulerStats:
        allocator = self.allocator
        return SchedulerStats(
            running=len(self.running),
            waiting=self._num_waiting,
            pages_used=allocator.num_pages - allocator.available,
            pages_free=allocator.available,
            pages_cached=allocator.num_cached,
            query_tokens=self.query_tokens,
            hit_tokens=self.hit_tokens,
            evictions=allocator.evictions,
            preemptions=self.preemptions,
        )

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; ValueError where it could never be finished."""
        assert seq.arrival == -1, f"sequence {seq.seq_id} was added before"
        assert not seq.output_ids, f"sequence {seq.seq_id} starts with {len(seq.output_ids)} generated tokens"
        prompt, new, allocator = len(seq.prompt_ids), seq.max_new_tokens, self.allocator
        if prompt < 1 or new < 1:
            raise ValueError(f"{prompt} prompt tokens and max_new_tokens={new}: expected at least one of each")
        if prompt + new > self.max_model_len:
            raise ValueError(
                f"{prompt} prompt tokens + {new} new ones = {prompt + new}, more than max_model_len={self.max_model_len}"
            )
        pages = allocator.pages_for(prompt + new - 1)  # the last token is never fed back
        if pages > allocator.num_pages:
            raise ValueError(
                f"{prompt} prompt tokens + {new} new ones need {pages} pages of {allocator.page_size} tokens, "
                f"there are {allocator.num_pages}"
            )
        seq.arrival = next(self._serial)
        seq.rank = (seq.priority * self.ageing + seq.arrival, seq.arrival)
        self._queue(seq)

    def finish(self, seq: Sequence) -> None:
        """End a sequence, done or aborted, at any time; its pages are free at once. Again is no error."""
        assert seq.arrival >= 0, f"sequence {seq.seq_id} was never added"
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        elif seq.status is Status.WAITING:
            self._num_waiting -= 1
        seq.status = Status.FINISHED
        if len(self._heap) > 2 * self._num_waiting + 64:  # rarely: so that what was aborted does not pile up
            self._heap = [item for item in self._heap if item[1].status is Status.WAITING]
            heapify(self._heap)

    abort = finish

    def fork(self, seq: Sequence, seq_ids: Iterable[int]) -> list[Sequence]:
        """New sequences that go on from where `seq` stands, on its pages: n samples of one prompt.

        To be called after `commit`, before a token is appended: `seq` and each of them takes one from the same logits.
        Where no more may run they wait, and find the full pages in the prefix index later.
        """
        assert self._pending is None, "fork between schedule and commit"
        assert seq.arrival >= 0, f"sequence {seq.seq_id} was never added"
        assert seq.status is not Status.FINISHED, f"sequence {seq.seq_id} is finished"
        children = []
        for seq_id in seq_ids:
            child = Sequence(seq_id, seq.prompt_ids, seq.max_new_tokens, seq.priority, list(seq.output_ids))
            child.arrival, child.rank = seq.arrival, (seq.rank[0], next(self._serial))
            child.cached_tokens = seq.cached_tokens
            if seq.status is Status.RUNNING and len(self.running) < self.max_num_seqs:
                # not the pages beyond: those are still to be written
                child.pages = seq.pages[: self.allocator.pages_for(seq.num_computed)]
                self.allocator.share(child.pages)
                child.num_computed, child.num_registered = seq.num_computed, seq.num_registered
                child.status = Status.RUNNING
                insort(self.running, child, key=lambda s: s.rank)
            else:
                self._queue(child)
            children.append(child)
        return children

    def schedule(self) -> Schedule:
        """The next step: empty only where there is no work."""
        assert self._pending is None, "the last step was not committed"
        out, running = Schedule(), self.running
        budget, i = self.max_num_batched_tokens, 0
        kept = self._decoding(0)  # tokens kept back from prompts, for those behind that decode
        head = self._head(out)
        while True:
            if head is not None and (i == len(running) or head.rank < running[i].rank):
                admitted = budget > kept and self._admit(head, i, out)
                kept = self._decoding(i)
                head = self._head(out) if admitted else None  # nothing passes one that has to wait
                continue
            if i == len(running):
                break
            seq = running[i]
            start, length = seq.num_computed, seq.length
            assert start < length, f"sequence {seq.seq_id} has no token to compute: nothing was appended"
            if length - start == 1:
                kept -= 1
                tokens = 1
            else:
                tokens = min(length - start, budget - kept)
                if tokens == 0:
                    i += 1
                    continue
            preempted = len(out.preempted)
            if self._reserve(seq, start + tokens, out):
                out.entries.append(Entry(seq, start, tokens, start + tokens == length))
                budget -= tokens
                i += 1
            if len(out.preempted) > preempted:
                kept = self._decoding(i)
                head = self._head(out) if head is not None else None
        assert out.entries or not self.has_work, "work, and nothing to run"
        self._pending = out if out.entries else None
        return out

    def commit(self, schedule: Schedule) -> None:
        """After the forward pass: its tokens count as computed, and the pages they filled can be found by others.

        Sequences finished in between are passed over: after a failed step, finish its sequences, then commit it.
        """
        assert schedule is self._pending or not schedule.entries, "commit of another step"
        self._pending = None
        size, caching = self.allocator.page_size, self.allocator.prefix_caching
        for entry in schedule.entries:
            seq = entry.seq
            if seq.status is Status.RUNNING:
                seq.num_computed = entry.start + entry.count
                if caching and seq.num_computed // size > seq.num_registered:
                    self._register(seq)

    def check(self) -> None:
        """Assert every invariant of the queue, of the running sequences and of the allocator."""
        ranks = [seq.rank for seq in self.running]
        assert ranks == sorted(ranks), ranks
        assert len(ranks) <= self.max_num_seqs, ranks
        waiting = [seq for _, seq in self._heap if seq.status is Status.WAITING]
        assert len(waiting) == len(set(map(id, waiting))) == self._num_waiting
        assert not any(seq.pages or seq.num_computed for seq in waiting), "a waiting sequence holds pages"
        for seq in self.running:
            assert seq.status is Status.RUNNING
            assert seq.num_computed <= len(seq.pages) * self.allocator.page_size
        self.allocator.check([seq.pages for seq in self.running])

    def _queue(self, seq: Sequence) -> None:
        seq.status = Status.WAITING
        heappush(self._heap, (seq.rank, seq))
        self._num_waiting += 1

    def _head(self, out: Schedule) -> Sequence | None:
        """The next to admit: none once it is one that this very step threw out."""
        heap = self._heap
        while heap and heap[0][1].status is not Status.WAITING:
            heappop(heap)
        return heap[0][1] if heap and heap[0][1] not in out.preempted else None

    def _decoding(self, first: int) -> int:
        """Sequences running from place `first` on that need one token."""
        return sum([seq.length - seq.num_computed == 1 for seq in self.running[first:]])

    def _admit(self, seq: Sequence, place: int, out: Schedule) -> bool:
        """Take the head of the queue in at `place`, with the pages of all tokens known, or leave all as it was.

        Where room lacks it may take that of running sequences of a higher priority number. A page is left for each
        running sequence, so that admitting one is not what makes the next step throw one out.
        """
        allocator, running = self.allocator, self.running
        if self._blocked is not None:
            blocked, available, num_running = self._blocked
            if blocked is seq and allocator.available <= available and len(running) >= num_running:
                return False  # nothing came free: do not look a long prompt up in vain at every step
        before = allocator.available
        pages = allocator.match(seq.token_ids) if seq.use_cache else []
        need = allocator.pages_for(seq.length) - len(pages)
        if len(running) >= self.max_num_seqs or need + len(running) > allocator.available:
            victims = list(takewhile(lambda victim: victim.priority > seq.priority, reversed(running[place:])))
            left, gain = len(running) - len(victims), sum(len(victim.pages) for victim in victims)
            if left >= self.max_num_seqs or need + left > allocator.available + gain:
                victims = []  # in vain even if all of them went
            for victim in victims:
                self._preempt(victim, out)
                if need + len(running) <= allocator.available:
                    break
            if len(running) >= self.max_num_seqs or need + len(running) > allocator.available:
                allocator.release(pages)
                self._blocked = (seq, before, len(running))
                return False
        fresh = allocator.allocate(need)
        assert fresh is not None
        popped = heappop(self._heap)[1]
        assert popped is seq
        self._num_waiting -= 1
        running.insert(place, seq)
        seq.status, seq.pages, seq.num_registered = Status.RUNNING, pages + fresh, len(pages)
        seq.num_computed = len(pages) * allocator.page_size
        if seq.preemptions == 0 and not seq.output_ids:
            seq.cached_tokens = seq.num_computed
        self.query_tokens += seq.length
        self.hit_tokens += seq.num_computed
        return True

    def _reserve(self, seq: Sequence, stop: int, out: Schedule) -> bool:
        """Pages of its own for the tokens up to `stop`. False: there were none, and it was preempted itself.

        Takes from the end of `running`, none of which has an entry yet. Only the first page written can be shared:
        those behind it were never filled.
        """
        allocator, pages = self.allocator, seq.pages
        need = allocator.pages_for(stop) - len(pages)
        while True:
            if need > 0 and (fresh := allocator.allocate(need)) is not None:
                pages += fresh
                need = 0
            if need <= 0:
                first = seq.num_computed // allocator.page_size
                own = allocator.make_writable(pages[first])
                if own is not None:
                    if own != pages[first]:
                        out.copies.append((pages[first], own))
                        pages[first] = own
                        seq.table_version += 1
                    return True
            victim = self.running[-1]
            self._preempt(victim, out)
            if victim is seq:
                return False

    def _preempt(self, seq: Sequence, out: Schedule) -> None:
        """Throw out the last running sequence: it keeps its tokens and computes them again."""
        popped = self.running.pop()
        assert popped is seq
        self._release(seq)
        seq.preemptions += 1
        self.preemptions += 1
        self._queue(seq)
        out.preempted.append(seq)

    def _release(self, seq: Sequence) -> None:
        self.allocator.release(seq.pages)
        seq.pages = []
        seq.num_computed = seq.num_registered = 0
        seq.table_version += 1

    def _register(self, seq: Sequence) -> None:
        size, pages = self.allocator.page_size, seq.pages
        full = seq.num_computed // size
        for k in range(seq.num_registered, full):
            tokens = tuple(seq.tokens(k * size, (k + 1) * size))
            page = self.allocator.register(pages[k], pages[k - 1] if k else None, tokens)
            if page != pages[k]:
                pages[k] = page
                seq.table_version += 1
        seq.num_registered = full
