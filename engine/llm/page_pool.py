"""`PagePool`: which pages of the KV cache are free, in use, or kept for a prefix that may come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from msgspec import Struct

PAGE_SIZE = 16  # tokens
ROOT = 0  # the empty prefix


class Prefix(Struct, frozen=True):
    """A cached run of full pages: their numbers, and the node that stands for all their tokens."""

    pages: list[int]
    node: int


class PagePool:
    """Reference-counted pages, and the prefix cache: (node of the pages before, tokens of a page) -> page.

    Keys hold the tokens themselves, so equal hashes cannot mix prefixes up. Page 0 is never handed out: it stays
    zero and pads page tables. Unused pages of known prefixes are evicted least recently used first, tails before
    heads.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._users = [0] * num_pages
        self._entries: dict[tuple[int, tuple[int, ...]], int] = {}
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # page -> its entry
        self._nodes: dict[int, int] = {}  # page -> node
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._next_node = ROOT + 1

    @property
    def num_available(self) -> int:
        """Pages that can be handed out, cached ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Pages in the prefix cache, in use or not."""
        return len(self._entries)

    def take(self, count: int) -> list[int] | None:
        """`count` pages for one user each, or None if there are not so many."""
        if count > self.num_available:
            return None
        while len(self._free) < count:
            self._forget(next(iter(self._idle)))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more user for each of these pages."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each page of a sequence, in its order."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._keys:
                self._idle[page] = None
            else:
                self._free.append(page)

    def find(self, tokens: Sequence[int]) -> Prefix:
        """The longest cached prefix of `tokens` that leaves a token to compute. Its pages must be shared to be kept."""
        pages: list[int] = []
        node = ROOT
        for start in range(0, len(tokens) - PAGE_SIZE, PAGE_SIZE):
            page = self._entries.get((node, tuple(tokens[start : start + PAGE_SIZE])))
            if page is None:
                break
            pages.append(page)
            node = self._nodes[page]
        return Prefix(pages, node)

    def add(self, node: int, tokens: Sequence[int], page: int) -> int:
        """Cache a full page behind `node`; the node of the longer prefix. The first of two equal pages stays."""
        key = (node, tuple(tokens))
        known = self._entries.get(key)
        if known is not None:
            return self._nodes[known]
        self._entries[key], self._keys[page], self._nodes[page] = page, key, self._next_node
        self._next_node += 1
        return self._nodes[page]

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: its entries hold another version's keys and values."""
        for page in list(self._keys):
            self._forget(page)

    def _forget(self, page: int) -> None:
        del self._entries[self._keys.pop(page)], self._nodes[page]
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)
