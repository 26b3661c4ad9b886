"""The invariants of allocator and scheduler, asserted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from grok_engine.runtime.allocator import ROOT, PageAllocator
from grok_engine.runtime.scheduler import Scheduler
from grok_engine.runtime.sequence import Status


def check_allocator(allocator: PageAllocator, holders: Iterable[Sequence[int]] | None = None) -> None:
    """Assert every invariant; `holders` are the pages of each sequence, and then all of the references."""
    free, refs = set(allocator._free), allocator._refs
    assert len(free) == len(allocator._free), "a page is free twice"
    for page in range(allocator.num_pages):
        states = (page in free, page in allocator._cached, refs[page] > 0)
        assert sum(states) == 1, f"page {page} is free, cached, held: {states}"
        assert page not in free or allocator._keys[page] is None, f"free page {page} is indexed"
        assert page not in allocator._cached or allocator._keys[page] is not None, f"cached page {page} is not indexed"
    indexed = [page for page, key in enumerate(allocator._keys) if key is not None]
    assert all(allocator._index[key] == page for page, key in enumerate(allocator._keys) if key is not None)
    assert len(indexed) == len(allocator._index), "two pages are indexed with one content"
    age = {page: place for place, page in enumerate(allocator._cached)}
    below = [0] * allocator.num_pages
    for key, page in allocator._index.items():
        if (parent := key[0]) != ROOT:
            assert allocator._keys[parent] is not None, f"page {page} is indexed behind {parent}, which is not"
            assert refs[parent] or age.get(page, len(age)) < age[parent], (
                f"page {page} would outlive {parent} before it"
            )
            below[parent] += refs[page]
    assert all(below[page] <= refs[page] for page in indexed), "a holder lacks the page before an indexed one"
    if holders is not None:
        held = [0] * allocator.num_pages
        for pages in holders:
            assert len(set(pages)) == len(pages), f"a sequence holds a page twice: {pages}"
            for page in pages:
                held[page] += 1
        assert held == refs, f"references held {held} differ from the counts {refs}"


def is_writable(allocator: PageAllocator, page: int) -> bool:
    """Whether the one holder of this page may write into it."""
    return allocator._refs[page] == 1 and allocator._keys[page] is None


def check_scheduler(scheduler: Scheduler) -> None:
    """Those of the queue, of the running sequences and of the allocator."""
    ranks = [seq.rank for seq in scheduler.running]
    assert ranks == sorted(ranks), ranks
    assert len(ranks) <= scheduler.max_num_seqs, ranks
    waiting = scheduler.waiting
    assert [seq.rank for seq in waiting] == sorted({seq.rank for seq in waiting})
    assert all(seq.status is Status.WAITING for seq in waiting)
    assert not any(seq.pages or seq.num_computed for seq in waiting), "a waiting sequence holds pages"
    for seq in scheduler.running:
        assert seq.status is Status.RUNNING
        assert seq.num_computed <= len(seq.pages) * scheduler.allocator.page_size
    check_allocator(scheduler.allocator, [seq.pages for seq in scheduler.running])
