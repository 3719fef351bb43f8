"""`PagePool` against a plain model of it, over random sequences of calls."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rollmill.engine.llm.page_pool import PAGE_SIZE, ROOT, PagePool

NUM_PAGES = 9


def page_of(token):
    return [token] * PAGE_SIZE


class Model:
    """Sequences of pages in use, and what was cached under which tokens."""

    def __init__(self, pool):
        self.pool = pool
        self.held = []  # (tokens by page, pages)
        self.cached = {}  # tuple of page tokens -> page; what was evicted is still listed

    def admit(self, tokens):
        """As the scheduler does: find, share, take the rest, cache all of it."""
        flat = [token for one in tokens for token in page_of(one)]
        prefix = self.pool.find([*flat, 0])
        for count, page in enumerate(prefix.pages, 1):
            assert self.cached[tuple(tokens[:count])] == page
        self.pool.share(prefix.pages)
        own = self.pool.take(len(tokens) - len(prefix.pages))
        if own is None:
            assert self.pool.num_available < len(tokens) - len(prefix.pages)
            self.pool.release(prefix.pages)
            return
        assert not set(own) & self.pages_in_use()
        pages, node = [*prefix.pages, *own], prefix.node
        for at in range(len(prefix.pages), len(tokens)):
            node = self.pool.add(node, page_of(tokens[at]), pages[at])
            self.cached[tuple(tokens[: at + 1])] = pages[at]
        self.held.append((tokens, pages))

    def pages_in_use(self):
        return {page for _, pages in self.held for page in pages}

    def num_free(self):
        return self.pool.num_pages - 1 - len(self.pages_in_use())

    def check(self):
        users = Counter(page for _, pages in self.held for page in pages)
        assert 0 not in users
        assert [self.pool._users[page] for page in range(NUM_PAGES)] == [users[page] for page in range(NUM_PAGES)]
        assert self.pool.num_available == self.num_free()
        idle = set(self.pool._idle)
        assert not idle & set(self.pool._free)
        assert idle | set(self.pool._free) == set(range(1, NUM_PAGES)) - set(users)
        assert idle <= set(self.pool._keys)
        assert self.pool.num_cached == len(self.pool._keys) == len(self.pool._nodes) <= NUM_PAGES - 1


@pytest.mark.parametrize("seed", range(8))
def test_random_sequences(seed):
    """Pages are used by whom they were given to, cached prefixes hold the right page, and nothing is lost."""
    rng, model = random.Random(seed), Model(PagePool(NUM_PAGES))
    for _ in range(400):
        match rng.choice(["admit", "admit", "release", "share", "grow", "forget"]):
            case "admit":
                model.admit([rng.randrange(2) for _ in range(rng.randrange(1, 5))])
            case "release" if model.held:
                _, pages = model.held.pop(rng.randrange(len(model.held)))
                model.pool.release(pages)
            case "share" if model.held:
                tokens, pages = rng.choice(model.held)
                count = rng.randrange(len(pages) + 1)
                model.pool.share(pages[:count])
                model.held.append((tokens[:count], list(pages[:count])))
            case "grow" if model.held:
                own = model.pool.take(1)
                if own is not None:
                    rng.choice(model.held)[1].extend(own)
            case "forget" if rng.random() < 0.1:
                model.pool.forget_prefixes()
                assert model.pool.num_cached == 0
                model.cached.clear()
        model.check()
    for _, pages in model.held:
        model.pool.release(pages)
    assert model.pool.num_available == NUM_PAGES - 1


@pytest.fixture
def pool():
    return PagePool(5)


def cache(pool, tokens):
    """Cached and unused pages for these page tokens."""
    pages, node = pool.take(len(tokens)), ROOT
    for token, page in zip(tokens, pages, strict=True):
        node = pool.add(node, page_of(token), page)
    pool.release(pages)
    return pages


def found(pool, tokens):
    return pool.find([*(t for one in tokens for t in page_of(one)), 0]).pages


def test_too_many_pages_are_not_given(pool):
    assert pool.take(5) is None
    assert pool.num_available == 4
    assert sorted(pool.take(4)) == [1, 2, 3, 4]
    assert pool.take(1) is None
    assert pool.take(0) == []


def test_a_prefix_leaves_a_token_to_compute(pool):
    (page,) = cache(pool, [7])
    assert pool.find(page_of(7)).pages == []
    assert pool.find([*page_of(7), 1]).pages == [page]
    assert pool.find([7] * (PAGE_SIZE - 1)).pages == []


def test_equal_pages_behind_different_ones_are_different(pool):
    first, second = cache(pool, [1, 3]), cache(pool, [2, 3])
    assert (found(pool, [1, 3]), found(pool, [2, 3]), found(pool, [3])) == (first, second, [])


def test_tails_are_evicted_before_heads_and_old_before_new(pool):
    old, new = cache(pool, [1, 2]), cache(pool, [3, 4])
    assert pool.take(1) == [old[1]]
    assert found(pool, [1, 2]) == old[:1]
    pool.share(old[:1])
    pool.release(old[:1])  # used again: now the newest
    pool.take(2)
    assert (found(pool, [1, 2]), found(pool, [3, 4])) == (old[:1], [])
    assert new


def test_the_first_of_two_equal_pages_stays(pool):
    one, other = pool.take(2)
    node = pool.add(ROOT, page_of(5), one)
    assert pool.add(ROOT, page_of(5), other) == node
    pool.release([other])
    pool.release([one])
    assert found(pool, [5]) == [one]
    assert pool.num_available == 4


def test_forgotten_pages_stay_with_their_users(pool):
    (page,) = pool.take(1)
    pool.add(ROOT, page_of(5), page)
    pool.forget_prefixes()
    assert found(pool, [5]) == []
    assert pool.num_available == 3
    pool.release([page])
    assert pool.num_available == 4
