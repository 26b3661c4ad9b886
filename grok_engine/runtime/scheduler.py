"""Which tokens run next: continuous batching over sequences, in pages. No torch.

Urgency is one fixed rank a sequence: priority · `ageing` + its arrival, the lowest first. Within a priority that is the
order of arrival. Across priorities it is ageing: all that wait grow older at the same pace, so that ageing never
changes their order and the rank need not either. A request can be overtaken by at most `ageing` later ones for each
level that separates the two, and so waits forever under no load.

The rank decides everything: who is offered tokens first, who is admitted next (nothing passes a waiting sequence of a
lower rank), and who is preempted when pages run out (the highest). The lowest rank of all therefore always advances:
whatever others hold can be taken from them or comes free, and `add` refuses what would not fit alone.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from itertools import count, takewhile
from operator import attrgetter

from .allocator import PageAllocator
from .plan import Entry, StepPlan
from .sequence import SequenceState, Status

_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Sequences and pages now, counts since the start. `hit_tokens` of `query_tokens` came from the prefix cache."""

    running: int
    waiting: int
    pages_used: int
    pages_free: int  # cached pages included
    pages_cached: int
    query_tokens: int
    hit_tokens: int
    evictions: int
    preemptions: int


@dataclass(slots=True)
class _Step:
    """A step in the making. Running sequences before `place` have had their turn."""

    budget: int  # tokens left to give
    reserved: int  # of them, kept back from prompts: one for each decoding sequence from `place` on
    admits: bool = True  # whether more sequences may be admitted in this step
    place: int = 0
    preempted: list[SequenceState] = field(default_factory=list)
    seqs: list[SequenceState] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """Shares a token budget a step, and the allocator's pages, among sequences. All of the pages are its own.

    One step is `schedule`, the forward pass, `commit`, and then, for each sequence whose last token gave logits:
    optionally `fork`, append a token, and `finish` it if that was the last. Prompts run in chunks beside the decoding
    sequences, each of which gets its one token first.

    `schedule` reserves pages but moves nothing forward: `num_computed`, `logits_from` and the prefix index change in
    `commit` alone. A forward pass writes only pages that one entry of its plan holds alone, and no page in the prefix
    index. So a step that fails in between leaves every sequence outside its plan intact, and can be given up in two
    ways: `finish` the plan's sequences, then `commit` the plan, which passes finished ones over; or undo it by
    preempting the plan's sequences, which keep their tokens and compute them again (they may not keep their pages:
    those replaced by a copy were never filled).
    """

    def __init__(
        self, allocator: PageAllocator, *, max_num_seqs: int, max_num_batched_tokens: int, ageing: int = 1024
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "each running sequence needs a token a step"
        self.allocator, self.ageing = allocator, ageing
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.preemptions = self.query_tokens = self.hit_tokens = self.prompt_tokens = 0
        self._serial = count()
        self.reset()

    def reset(self) -> None:
        """Forget every sequence. Their pages are not released: reset the allocator too."""
        self.running: list[SequenceState] = []  # by rank
        self.waiting: list[SequenceState] = []  # by rank
        self._pending: tuple[StepPlan, list[SequenceState]] | None = None  # scheduled, not committed
        self._blocked: tuple[SequenceState, int, int] | None = None  # refused at so many free pages and running ones

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def stats(self) -> SchedulerStats:
        allocator = self.allocator
        return SchedulerStats(
            running=len(self.running),
            waiting=len(self.waiting),
            pages_used=allocator.num_pages - allocator.available,
            pages_free=allocator.available,
            pages_cached=allocator.num_cached,
            query_tokens=self.query_tokens,
            hit_tokens=self.hit_tokens,
            evictions=allocator.evictions,
            preemptions=self.preemptions,
        )

    # Sequences

    def check_fits(self, seq: SequenceState) -> None:
        """ValueError if a new sequence could never be finished."""
        prompt, new, allocator = len(seq.prompt_ids), seq.max_new_tokens, self.allocator
        assert prompt >= 1, f"sequence {seq.seq_id} has no token"
        pages = allocator.pages_for(prompt + new - 1)  # the last token is never fed back
        if pages > allocator.num_pages:
            raise ValueError(
                f"{prompt} prompt tokens + {new} new ones need {pages} pages of {allocator.page_size} tokens, "
                f"there are {allocator.num_pages}"
            )

    def add(self, seq: SequenceState) -> None:
        """Queue a new sequence that fits."""
        assert seq.status is Status.NEW, f"sequence {seq.seq_id} was added before"
        assert not seq.output_ids, f"sequence {seq.seq_id} starts with {len(seq.output_ids)} generated tokens"
        seq.arrival = next(self._serial)
        seq.rank = (seq.priority * self.ageing + seq.arrival, seq.arrival)
        self._wait(seq)

    def finish(self, seq: SequenceState) -> None:
        """End a sequence, done or aborted, at any time; its pages are free at once. Again is no error."""
        assert seq.status is not Status.NEW, f"sequence {seq.seq_id} was never added"
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self._release(seq)
        elif seq.status is Status.WAITING:
            del self.waiting[bisect_left(self.waiting, seq.rank, key=_rank)]
        seq.status = Status.FINISHED

    def fork(self, seq: SequenceState, child: SequenceState) -> None:
        """Start a new sequence where `seq` stands, on its pages: one of n samples of a prompt.

        Call after `commit`, before a token is appended: `seq` and `child` take one from the same logits. A child beyond
        max_num_seqs waits, and finds the full pages in the prefix index later.
        """
        assert self._pending is None, "fork between schedule and commit"
        assert seq.status in (Status.WAITING, Status.RUNNING), f"sequence {seq.seq_id} is {seq.status.value}"
        assert child.status is Status.NEW, f"sequence {child.seq_id} was added before"
        assert child.prompt_ids is seq.prompt_ids, f"sequence {child.seq_id} has another prompt"
        assert child.output_ids == seq.output_ids, f"sequence {child.seq_id} has another output"
        child.arrival, child.rank = seq.arrival, (seq.rank[0], next(self._serial))
        child.cached_tokens, child.logits_from = seq.cached_tokens, seq.logits_from
        if seq.status is Status.RUNNING and len(self.running) < self.max_num_seqs:
            child.pages = seq.pages[: self.allocator.pages_for(seq.num_computed)]  # pages beyond are unwritten
            self.allocator.hold(child.pages)
            child.num_computed, child.num_registered = seq.num_computed, seq.num_registered
            child.status = Status.RUNNING
            insort(self.running, child, key=_rank)
        else:
            self._wait(child)

    # Steps

    def schedule(self) -> StepPlan:
        """The next step, which is empty only if there is no work.

        Running and waiting sequences are merged by rank: a waiting one whose turn comes is admitted at its place among
        the running ones and then given tokens like them.
        """
        assert self._pending is None, "the last step was not committed"
        running = self.running
        step = _Step(self.max_num_batched_tokens, self._decoding(0))
        while True:
            head = self.waiting[0] if self.waiting and step.admits else None
            seq = running[step.place] if step.place < len(running) else None
            if head in step.preempted:
                head = None
            if head is not None and (seq is None or head.rank < seq.rank):
                self._admit(head, step)
            elif seq is not None:
                self._give_tokens(seq, step)
            else:
                break
        assert step.entries or not self.has_work, "work, and nothing to run"
        plan = StepPlan(tuple(step.entries), tuple(step.copies))
        self._pending = (plan, step.seqs) if step.entries else None
        return plan

    def commit(self, plan: StepPlan) -> None:
        """After the forward pass: count its tokens as computed, and index the pages they filled.

        Sequences finished since `schedule` are passed over.
        """
        pending, seqs = self._pending or (StepPlan(), [])
        assert plan is pending or not plan.entries, "commit of another step"
        self._pending = None
        size, caching = self.allocator.page_size, self.allocator.prefix_caching
        for entry, seq in zip(plan.entries, seqs, strict=True):
            if seq.status is Status.RUNNING:
                tokens = len(entry.token_ids)
                seq.num_computed = stop = entry.start + tokens
                if stop > seq.logits_from:
                    seq.logits_from = stop
                self.prompt_tokens += tokens - (entry.start >= len(seq.prompt_ids))  # less a decoded one
                if caching and seq.num_computed // size > seq.num_registered:
                    self._register(seq)

    # Tokens for a running sequence

    def _give_tokens(self, seq: SequenceState, step: _Step) -> None:
        """The token that a decoding sequence needs, or as much of a prompt as the budget leaves."""
        start, length = seq.num_computed, seq.length
        assert start < length, f"sequence {seq.seq_id} has no token to compute: nothing was appended"
        if length - start == 1:
            step.reserved -= 1
            tokens = 1
        else:
            tokens = min(length - start, step.budget - step.reserved)
        if tokens == 0:
            step.place += 1
            return
        stop, preempted = start + tokens, len(step.preempted)
        if self._reserve(seq, stop, step):
            first = max(start, seq.logits_from)
            num_logits = stop - first if stop > first else 0
            step.entries.append(Entry(seq.tokens(start, stop), start, seq.pages[:], num_logits, seq.seq_id))
            step.seqs.append(seq)
            step.budget -= tokens
            step.place += 1
        if len(step.preempted) > preempted:
            step.reserved = self._decoding(step.place)

    def _decoding(self, first: int) -> int:
        """Sequences running from place `first` on that need one token."""
        return sum([seq.decodes for seq in self.running[first:]])

    # Admission

    def _admit(self, seq: SequenceState, step: _Step) -> None:
        """Take the head of the queue in at `step.place`, with pages for all of its tokens, or end this step's
        admissions: nothing passes one that has to wait."""
        step.admits = step.budget > step.reserved and self._start(seq, step)
        step.reserved = self._decoding(step.place)

    def _start(self, seq: SequenceState, step: _Step) -> bool:
        """Start `seq` if there are pages and a seat, preempting sequences of a higher priority number if need be.

        A page is left for each running sequence, so that an admission is not what makes the next step preempt one.
        """
        allocator, running = self.allocator, self.running
        if self._blocked is not None:
            blocked, available, num_running = self._blocked
            if blocked is seq and allocator.available <= available and len(running) >= num_running:
                return False  # nothing came free since: do not look up a long prompt again in each step
        before = allocator.available
        cached = allocator.match(seq.prompt_ids + seq.output_ids) if seq.use_cache else []
        need = allocator.pages_for(seq.length) - len(cached)
        if len(running) >= self.max_num_seqs or need + len(running) > allocator.available:
            self._preempt_for(seq, need, step)
            if len(running) >= self.max_num_seqs or need + len(running) > allocator.available:
                allocator.release(cached)
                self._blocked = (seq, before, len(running))
                return False
        fresh = allocator.allocate(need)
        assert fresh is not None
        assert self.waiting[0] is seq
        del self.waiting[0]
        running.insert(step.place, seq)
        seq.status, seq.pages, seq.num_registered = Status.RUNNING, array("i", cached + fresh), len(cached)
        seq.num_computed = len(cached) * allocator.page_size
        if seq.preemptions == 0 and not seq.output_ids:
            seq.cached_tokens = seq.num_computed
        self.query_tokens += seq.length
        self.hit_tokens += seq.num_computed
        return True

    # Pages, and preemption where there are none

    def _reserve(self, seq: SequenceState, stop: int, step: _Step) -> bool:
        """Give `seq` pages of its own for its tokens up to `stop`. False: there were none, and it was preempted itself.

        Only the first page written can be shared with others: those behind it were never filled.
        """
        allocator, pages = self.allocator, seq.pages
        need = allocator.pages_for(stop) - len(pages)
        while True:
            if need > 0 and (fresh := allocator.allocate(need)) is not None:
                pages.extend(fresh)
                need = 0
            if need <= 0:
                first = seq.num_computed // allocator.page_size
                own = allocator.make_writable(pages[first])
                if own is not None:
                    if own != pages[first]:
                        step.copies.append((pages[first], own))
                        pages[first] = own
                    return True
            if self._preempt_last(step) is seq:
                return False

    def _preempt_for(self, seq: SequenceState, need: int, step: _Step) -> None:
        """Preempt less urgent sequences until `seq` has a seat and `need` pages; none if all of them would not do."""
        allocator, running = self.allocator, self.running
        victims = list(takewhile(lambda v: v.priority > seq.priority, reversed(running[step.place :])))
        left, gain = len(running) - len(victims), sum(len(v.pages) for v in victims)
        if left >= self.max_num_seqs or need + left > allocator.available + gain:
            return
        for _ in victims:
            self._preempt_last(step)
            if need + len(running) <= allocator.available:
                break

    def _preempt_last(self, step: _Step) -> SequenceState:
        """Preempt the running sequence of the highest rank, which has no entry yet: it keeps its tokens, gives up its
        pages, and waits to compute the tokens again in a later step."""
        seq = self.running.pop()
        self._release(seq)
        seq.preemptions += 1
        self.preemptions += 1
        self._wait(seq)
        step.preempted.append(seq)
        return seq

    def _wait(self, seq: SequenceState) -> None:
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=_rank)

    def _release(self, seq: SequenceState) -> None:
        self.allocator.release(seq.pages)
        seq.pages = array("i")
        seq.num_computed = seq.num_registered = 0

    def _register(self, seq: SequenceState) -> None:
        """Offer the full pages to the prefix index, which may give another page of the same content in exchange."""
        size, pages = self.allocator.page_size, seq.pages
        full = seq.num_computed // size
        for k in range(seq.num_registered, full):
            tokens = tuple(seq.tokens(k * size, (k + 1) * size))
            pages[k] = self.allocator.register(pages[k], pages[k - 1] if k else None, tokens)
        seq.num_registered = full
