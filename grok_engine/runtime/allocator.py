"""Which page holds whose keys and values: references, shared prefixes, eviction. A page is a number; no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

Key = tuple[int, tuple[int, ...]]  # what an indexed page is found by: the page before it, and its own tokens

ROOT = -1  # stands before the first page of every sequence


class PageAllocator:
    """`num_pages` pages of `page_size` tokens each. Taking a page and giving it back are O(1).

    A page is free, or held (as many times as its count says), or cached: held by none, but found by its content until
    its place is needed. Only a page held once and not indexed may be written.

    The index of full pages is a tree whose nodes are the pages themselves, an edge being the exact tokens of a page:
    nothing is compared by hash alone. One invariant carries it: whoever holds an indexed page also holds the page
    before it. `register` keeps it by handing the caller the page that already has this content, and `release` keeps it
    in time: the end of a sequence becomes evictable before its beginning. So the least recently used cached page never
    has an indexed page behind it, and a page's number can stand for all the tokens up to its end.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages}, page_size={page_size}: expected at least 1 of each")
        self.num_pages, self.page_size, self.prefix_caching = num_pages, page_size, prefix_caching
        self.hits = 0  # pages that `match` found
        self.evictions = 0  # cached pages whose content was given up for another's
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._index: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * num_pages  # of the indexed pages
        self._children = [0] * num_pages  # indexed pages behind this one

    @property
    def available(self) -> int:
        """Pages that `allocate` can still give: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and `match` still finds."""
        return len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-num_tokens // self.page_size)

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """The pages of the longest indexed prefix, each now held by the caller.

        At most (len - 1) // page_size of them: the last token is left to compute, for its logits.
        """
        pages: list[int] = []
        if not self.prefix_caching:
            return pages
        size, parent = self.page_size, ROOT
        for start in range(0, len(token_ids) - size, size):
            page = self._index.get((parent, tuple(token_ids[start : start + size])))
            if page is None:
                break
            pages.append(page)
            parent = page
        for page in pages:
            self._hold(page)
        self.hits += len(pages)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages to write, held once by the caller; None, and nothing taken, where there are not as many."""
        assert count >= 0, count
        if count > self.available:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold each of the pages once more, for a sequence that starts with the same tokens."""
        for page in pages:
            assert self._refs[page] > 0, f"page {page} is held by nobody"
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Give back a sequence's pages, in its order: all of them, or those from some place to its end."""
        for page in reversed(pages):
            self._drop(page)

    def writable(self, page: int) -> bool:
        """Whether the one holder of this page may write into it."""
        return self._refs[page] == 1 and self._keys[page] is None

    def make_writable(self, page: int) -> int | None:
        """`page` where its holder may write into it, else a fresh one that replaces it, to copy its content to.

        None, and nothing changed, where there is no page left.
        """
        if self._refs[page] == 1 and self._keys[page] is None:
            return page
        assert self._refs[page] > 0, f"page {page} is held by nobody"
        fresh = self.allocate(1)
        if fresh is None:
            return None
        self._drop(page)
        return fresh[0]

    def register(self, page: int, parent: int | None, tokens: tuple[int, ...]) -> int:
        """Index a full page as what follows `parent`, the caller's page before it (None: it is the first).

        Returns the page to hold from now on. Where this content is indexed already, that is the other page: the
        caller's reference moves there and `page` is given back, so that equal sequences computed at the same time
        come to share their pages too.
        """
        if not self.prefix_caching:
            return page
        assert len(tokens) == self.page_size, f"{len(tokens)} tokens do not fill a page of {self.page_size}"
        assert self._refs[page] > 0, f"page {page} is held by nobody"
        key = (ROOT if parent is None else parent, tokens)
        if self._keys[page] is not None:
            assert self._keys[page] == key, f"page {page} is indexed with another content"
            return page
        if parent is not None and self._keys[parent] is None:
            return page  # found by nobody, so nothing can be found behind it
        first = self._index.get(key)
        if first is not None:
            self._hold(first)
            self._drop(page)
            return first
        if self._refs[page] == 1:  # other holders might not hold `parent`
            self._index[key] = page
            self._keys[page] = key
            if parent is not None:
                self._children[parent] += 1
        return page

    def check(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Assert every invariant; `holders` are the pages of each sequence, and then all of the references."""
        free, refs = set(self._free), self._refs
        assert len(free) == len(self._free), "a page is free twice"
        for page in range(self.num_pages):
            states = (page in free, page in self._cached, refs[page] > 0)
            assert sum(states) == 1, f"page {page} is free, cached, held: {states}"
            assert page not in free or self._keys[page] is None, f"free page {page} is indexed"
            assert page not in self._cached or self._keys[page] is not None, f"cached page {page} is not indexed"
        indexed = [page for page, key in enumerate(self._keys) if key is not None]
        assert all(self._index[key] == page for page, key in enumerate(self._keys) if key is not None)
        assert len(indexed) == len(self._index), "two pages are indexed with one content"
        age = {page: place for place, page in enumerate(self._cached)}
        children, below = [0] * self.num_pages, [0] * self.num_pages
        for key, page in self._index.items():
            if (parent := key[0]) != ROOT:
                assert self._keys[parent] is not None, f"page {page} is indexed behind {parent}, which is not"
                assert refs[parent] or age.get(page, len(age)) < age[parent], (
                    f"page {page} would outlive {parent} before it"
                )
                children[parent] += 1
                below[parent] += refs[page]
        assert children == self._children, (children, self._children)
        assert all(below[page] <= refs[page] for page in indexed), "a holder lacks the page before an indexed one"
        if holders is not None:
            held = [0] * self.num_pages
            for pages in holders:
                assert len(set(pages)) == len(pages), f"a sequence holds a page twice: {pages}"
                for page in pages:
                    held[page] += 1
            assert held == refs, f"references held {held} differ from the counts {refs}"

    def _hold(self, page: int) -> None:
        if self._refs[page] == 0:
            del self._cached[page]
        self._refs[page] += 1

    def _drop(self, page: int) -> None:
        assert self._refs[page] > 0, f"page {page} is held by nobody"
        self._refs[page] -= 1
        if self._refs[page] == 0:
            if self._keys[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        key = self._keys[page]
        assert key is not None
        # its number is about to mean another content, under which they would be found
        assert self._children[page] == 0, f"page {page} has indexed pages behind it"
        del self._index[key]
        self._keys[page] = None
        if key[0] != ROOT:
            self._children[key[0]] -= 1
        self.evictions += 1
        return page
