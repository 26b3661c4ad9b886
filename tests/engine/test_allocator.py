"""The page allocator against a model of its holders and of each page's content."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from grok_engine.runtime.allocator import PageAllocator
from tests.engine.invariants import check_allocator, is_writable

SCALE = int(os.environ.get("GROK_TEST_SCALE", "1"))  # more examples, for a longer look


def bits(number: int, length: int) -> list[int]:
    """Few different tokens, so that prefixes coincide."""
    return [number >> i & 1 for i in range(length)]


class Held:
    """A sequence as its holder sees it: its tokens, all of them written, and its pages."""

    def __init__(self, tokens: list[int], pages: list[int]) -> None:
        self.tokens, self.pages = tokens, pages


class Pages(RuleBasedStateMachine):
    """Sequences that start, grow, fork, shrink and end; each must always read its own tokens back."""

    @initialize(num_pages=st.integers(1, 14), page_size=st.integers(1, 3), caching=st.sampled_from([True, True, False]))
    def start(self, num_pages: int, page_size: int, caching: bool) -> None:
        self.allocator = PageAllocator(num_pages, page_size, caching)
        self.size = page_size
        self.memory: list[list[int | None]] = [[None] * page_size for _ in range(num_pages)]
        self.held: list[Held] = []
        self.hits = 0  # pages that `match` found

    def used(self) -> set[int]:
        return {page for h in self.held for page in h.pages}

    def take(self, count: int) -> list[int] | None:
        available = self.allocator.num_pages - len(self.used())
        assert self.allocator.available == available
        pages = self.allocator.allocate(count)
        assert (pages is None) == (count > available)
        if pages is not None:
            assert len(set(pages)) == count
            assert not self.used() & set(pages), "a held page was given out"
            for page in pages:
                self.memory[page] = [None] * self.size
        return pages

    def write(self, h: Held, token: int) -> None:
        page = h.pages[len(h.tokens) // self.size]
        assert is_writable(self.allocator, page)
        assert [page in other.pages for other in self.held].count(True) == 1, "a shared page is written"
        self.memory[page][len(h.tokens) % self.size] = token
        h.tokens.append(token)
        if len(h.tokens) % self.size == 0:
            k = len(h.tokens) // self.size - 1
            content = tuple(h.tokens[k * self.size :])
            h.pages[k] = self.allocator.register(page, h.pages[k - 1] if k else None, content)

    @rule(number=st.integers(0, 255), length=st.integers(1, 12))
    def new(self, number: int, length: int) -> None:
        tokens = bits(number, length)
        found = self.allocator.match(tokens)
        assert len(found) <= (length - 1) // self.size
        self.hits += len(found)
        h = Held(tokens[: len(found) * self.size], found)
        self.held.append(h)
        self.read(h)
        pages = self.take(self.allocator.pages_for(length) - len(found))
        if pages is None:
            self.held.remove(h)
            self.allocator.release(found)
            return
        h.pages += pages
        for token in tokens[len(h.tokens) :]:
            self.write(h, token)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 31), number=st.integers(0, 15), length=st.integers(1, 4))
    def grow(self, which: int, number: int, length: int) -> None:
        h = self.held[which % len(self.held)]
        for token in bits(number, length):
            place = len(h.tokens) // self.size
            if place == len(h.pages):
                pages = self.take(1)
                if pages is None:
                    return
                h.pages += pages
            else:
                old, available = h.pages[place], self.allocator.available
                page = self.allocator.make_writable(old)
                if page is None:
                    assert available == 0
                    return
                if page != old:
                    assert page not in self.used()
                    self.memory[page] = list(self.memory[old])
                    h.pages[place] = page
            self.write(h, token)

    @precondition(lambda self: 0 < len(self.held) < 12)
    @rule(which=st.integers(0, 31))
    def fork(self, which: int) -> None:
        h = self.held[which % len(self.held)]
        self.allocator.hold(h.pages)
        self.held.append(Held(list(h.tokens), list(h.pages)))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 31))
    def end(self, which: int) -> None:
        self.allocator.release(self.held.pop(which % len(self.held)).pages)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 31), keep=st.integers(0, 6))
    def shrink(self, which: int, keep: int) -> None:
        """Release all but the first pages, as rejected draft tokens would."""
        h = self.held[which % len(self.held)]
        if keep < len(h.pages):
            self.allocator.release(h.pages[keep:])
            h.pages, h.tokens = h.pages[:keep], h.tokens[: keep * self.size]

    def read(self, h: Held) -> None:
        content = [self.memory[h.pages[i // self.size]][i % self.size] for i in range(len(h.tokens))]
        assert content == h.tokens, "a sequence reads tokens that are not its own"

    @invariant()
    def everything_holds(self) -> None:
        check_allocator(self.allocator, [h.pages for h in self.held])
        for h in self.held:
            self.read(h)
            found = self.allocator.match([*h.tokens, 0])
            full = h.pages[: len(h.tokens) // self.size] if self.allocator.prefix_caching else []
            assert found == full, "a held prefix is not found"
            self.allocator.release(found)


TestPages = Pages.TestCase
TestPages.settings = settings(
    max_examples=300 * SCALE,
    stateful_step_count=100,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def filled(allocator: PageAllocator, tokens: list[int]) -> list[int]:
    """A sequence computed behind its cached prefix, with its full pages registered."""
    pages = allocator.match(tokens)
    first, size = len(pages), allocator.page_size
    fresh = allocator.allocate(allocator.pages_for(len(tokens)) - first)
    assert fresh is not None
    pages += fresh
    for k in range(first, len(tokens) // size):
        pages[k] = allocator.register(pages[k], pages[k - 1] if k else None, tuple(tokens[k * size : (k + 1) * size]))
    return pages


def test_a_long_random_run_without_shrinking() -> None:
    """The machine's rules in one long random run."""
    rng, machine = random.Random(7), Pages()
    machine.start(14, 2, True)
    for _ in range(20_000 * SCALE):
        pick, number = rng.randrange(32), rng.randrange(256)
        kind = rng.randrange(10) if machine.held else 0
        if kind < 3:
            machine.new(number, rng.randint(1, 12))
        elif kind < 6:
            machine.grow(pick, number % 16, rng.randint(1, 4))
        elif kind == 6 and len(machine.held) < 12:
            machine.fork(pick)
        elif kind == 7:
            machine.shrink(pick, rng.randrange(7))
        else:
            machine.end(pick)
        machine.everything_holds()
    assert machine.hits > 100
    assert machine.allocator.evictions > 100


def test_bad_sizes_are_refused_with_their_values() -> None:
    with pytest.raises(ValueError, match="num_pages=0, page_size=4"):
        PageAllocator(0, 4)
    with pytest.raises(ValueError, match="num_pages=4, page_size=0"):
        PageAllocator(4, 0)


def test_allocation_is_all_or_nothing() -> None:
    allocator = PageAllocator(4, 2)
    first = allocator.allocate(3)
    assert first is not None
    assert sorted(first) == [0, 1, 2]
    assert allocator.allocate(2) is None
    assert allocator.available == 1
    assert allocator.allocate(0) == []
    allocator.release(first)
    assert allocator.available == 4
    check_allocator(allocator, [])


def test_match_leaves_a_token_to_compute() -> None:
    allocator = PageAllocator(8, 4)
    pages = filled(allocator, list(range(8)))
    for length, expected in ((1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2)):
        found = allocator.match(list(range(length)))
        assert found == pages[:expected], length
        allocator.release(found)
    assert allocator.match([0, 1, 2, 4, 4]) == []
    assert allocator.match([4, 5, 6, 7, 8]) == []  # the second page is not found without the first


def test_released_pages_are_found_until_they_are_needed() -> None:
    allocator = PageAllocator(4, 2)
    pages = filled(allocator, [1, 2, 3, 4, 5])
    allocator.release(pages)
    assert (allocator.available, allocator.num_cached) == (4, 2)
    again = allocator.match([1, 2, 3, 4, 9])
    assert again == pages[:2]
    assert allocator.available == 2
    assert allocator.allocate(2) is not None
    assert allocator.allocate(1) is None  # a matched page cannot be taken away
    assert allocator.evictions == 0


def test_eviction_takes_the_least_recently_used_and_ends_before_beginnings() -> None:
    allocator = PageAllocator(5, 1)
    a = filled(allocator, [1, 2, 3])
    b = filled(allocator, [7, 8])
    allocator.release(a)
    allocator.release(b)
    taken = allocator.allocate(1)
    assert taken == [a[2]]
    assert allocator.match([1, 2, 3, 4]) == a[:2]
    allocator.release(a[:2])  # now younger than b
    assert allocator.allocate(2) == [b[1], b[0]]
    assert allocator.allocate(2) == [a[1], a[0]]
    assert allocator.evictions == 5
    check_allocator(allocator)


def test_a_page_reused_for_other_content_is_not_found_as_before() -> None:
    allocator = PageAllocator(2, 1)
    allocator.release(filled(allocator, [1, 2]))
    other = filled(allocator, [5, 2])
    assert allocator.match([1, 2, 3]) == []
    assert allocator.match([5, 2, 3]) == other
    check_allocator(allocator, [other, other])


def test_equal_content_computed_twice_comes_to_share_pages() -> None:
    allocator = PageAllocator(6, 2)
    a, b = allocator.allocate(2), allocator.allocate(2)  # neither could find the other: both are computed
    assert a is not None
    assert b is not None
    for pages in (a, b):
        pages[0] = allocator.register(pages[0], None, (1, 2))
        pages[1] = allocator.register(pages[1], pages[0], (3, 4))
    assert a == b
    assert allocator.available == 4
    check_allocator(allocator, [a, b])


def test_a_page_whose_other_holder_may_lack_the_one_before_is_not_indexed() -> None:
    allocator = PageAllocator(6, 1)
    filled(allocator, [1])
    pages = allocator.allocate(3)
    assert pages is not None
    a, b = list(pages), list(pages)
    allocator.hold(b)
    a[0] = allocator.register(a[0], None, (1,))  # now another page than b's
    assert a[0] != b[0]
    a[1] = allocator.register(a[1], a[0], (2,))
    assert a[1] == b[1]
    allocator.release(b)
    a[2] = allocator.register(a[2], a[1], (3,))  # a's alone, but behind one that is not indexed
    found = allocator.match([1, 2, 3, 4])
    assert found == a[:1]
    allocator.release(found)
    allocator.release(a)
    check_allocator(allocator)


def test_colliding_hashes_are_told_apart() -> None:
    allocator = PageAllocator(4, 1)
    assert hash(-1) == hash(-2)
    a = filled(allocator, [-1])
    assert allocator.match([-2, 0]) == []
    b = filled(allocator, [-2])
    assert a != b
    assert allocator.match([-2, 0]) == b


def test_the_first_to_write_a_shared_page_gets_a_copy_and_the_last_keeps_it() -> None:
    allocator = PageAllocator(4, 4)
    pages = allocator.allocate(1)
    assert pages is not None
    allocator.hold(pages)
    allocator.hold(pages)
    copies = [allocator.make_writable(pages[0]) for _ in range(2)]
    assert pages[0] not in copies
    assert copies[0] != copies[1]
    assert allocator.make_writable(pages[0]) == pages[0]
    check_allocator(allocator, [pages, copies[:1], copies[1:]])


def test_a_copy_that_finds_no_page_changes_nothing() -> None:
    allocator = PageAllocator(1, 4)
    pages = allocator.allocate(1)
    assert pages is not None
    allocator.hold(pages)
    assert allocator.make_writable(pages[0]) is None
    check_allocator(allocator, [pages, pages])


def test_an_indexed_page_is_never_written() -> None:
    allocator = PageAllocator(2, 2)
    (page,) = filled(allocator, [1, 2])
    assert not is_writable(allocator, page)
    copy = allocator.make_writable(page)
    assert copy not in (page, None)
    assert allocator.num_cached == 1  # still found


def test_without_prefix_caching_nothing_is_kept() -> None:
    allocator = PageAllocator(4, 1, prefix_caching=False)
    pages = filled(allocator, [1, 2, 3])
    assert allocator.match([1, 2, 3, 4]) == []
    allocator.release(pages)
    assert (allocator.available, allocator.num_cached) == (4, 0)
    check_allocator(allocator, [])


def test_releasing_what_is_not_held_is_caught() -> None:
    allocator = PageAllocator(2, 1)
    with pytest.raises(AssertionError, match="page 0 is held by nobody"):
        allocator.release([0])
    with pytest.raises(AssertionError, match="page 1 is held by nobody"):
        allocator.hold([1])


def test_check_finds_planted_faults() -> None:
    def fresh() -> tuple[PageAllocator, list[int]]:
        allocator = PageAllocator(4, 1)
        return allocator, filled(allocator, [1, 2])

    allocator, pages = fresh()
    allocator._free.pop()
    with pytest.raises(AssertionError, match="is free, cached, held"):
        check_allocator(allocator)
    allocator, pages = fresh()
    allocator._free.append(pages[0])
    with pytest.raises(AssertionError, match="is free, cached, held"):
        check_allocator(allocator)
    allocator, pages = fresh()
    with pytest.raises(AssertionError, match="differ from the counts"):
        check_allocator(allocator, [pages, pages])
    allocator, pages = fresh()
    allocator.release(pages[:1])  # the beginning before the end
    with pytest.raises(AssertionError, match=r"would outlive|lacks the page"):
        check_allocator(allocator)
