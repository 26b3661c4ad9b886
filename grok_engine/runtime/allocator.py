"""Who holds which page: reference counts, the prefix index, eviction. A page is a number here; no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

Key = tuple[int, tuple[int, ...]]  # of an indexed page: the page before it, and its own tokens

ROOT = -1  # the page before the first of every sequence


class PageAllocator:
    """`num_pages` pages of `page_size` tokens each. Allocating and releasing a page are O(1).

    A page is free, held (with a reference count), or cached: held by none, but still found by its content until it is
    evicted. Only a page that is held once and not indexed may be written.

    The prefix index is a tree whose nodes are full pages and whose edges are the exact tokens of a page; nothing is
    compared by hash alone. It rests on one invariant: whoever holds an indexed page also holds the page before it.
    `register` keeps it by handing the caller the page that already has this content, and `release` keeps it over time:
    the end of a sequence becomes evictable before its beginning. So the least recently used cached page never has an
    indexed page behind it, and a page's number identifies all tokens up to its end.
    """

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages}, page_size={page_size}: expected at least 1 of each")
        self.num_pages, self.page_size, self.prefix_caching = num_pages, page_size, prefix_caching
        self.evictions = 0
        self.reset()

    def reset(self) -> None:
        """Free every page, whoever holds it, and forget every prefix."""
        self._refs = [0] * self.num_pages
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._index: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * self.num_pages  # None: not indexed

    @property
    def available(self) -> int:
        """Pages that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and `match` finds."""
        return len(self._cached)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def match(self, token_ids: Sequence[int]) -> list[int]:
        """The pages of the longest indexed prefix, which the caller now holds.

        At most (len - 1) // page_size of them: the last token has to be computed for its logits.
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
        self.hold(pages)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """`count` writable pages, which the caller now holds; None, and nothing allocated, if there are fewer."""
        assert count >= 0, count
        if count > self.available:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Hold each page, which is held or cached, once more."""
        for page in pages:
            if self._refs[page] == 0:
                assert page in self._cached, f"page {page} is held by nobody"
                del self._cached[page]
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Release a sequence's pages, in its order: all of them, or those from some place to its end."""
        for page in reversed(pages):
            self._drop(page)

    def make_writable(self, page: int) -> int | None:
        """`page` if its holder may write into it, else a fresh page that replaces it, to copy its content to.

        None, and nothing changed, if no page is available.
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
        """Index a full page behind `parent`, the caller's page before it (None: it is the first).

        Returns the page to hold from now on. If this content is already indexed, that is the other page: the caller's
        reference moves there and `page` is released, so that equal sequences computed at the same time share pages too.
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
            return page  # `match` cannot reach what is behind an unindexed page
        first = self._index.get(key)
        if first is not None:
            self.hold([first])
            self._drop(page)
            return first
        if self._refs[page] == 1:  # other holders might not hold `parent`
            self._index[key] = page
            self._keys[page] = key
        return page

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
        del self._index[key]
        self._keys[page] = None
        self.evictions += 1
        return page
