"""`Scheduler` alone: what each step computes, and what must hold between any two steps."""

from __future__ import annotations

import random

import pytest
import torch

from rollmill.engine import EngineConfig, SamplingParams
from rollmill.engine.llm.attention import AttentionSpec
from rollmill.engine.llm.kv_cache import KVCache
from rollmill.engine.llm.page_pool import PAGE_SIZE, PagePool
from rollmill.engine.llm.request import Request
from rollmill.engine.llm.sampler import Draw
from rollmill.engine.llm.scheduler import Scheduler


def make_scheduler(num_pages, **options):
    cache = KVCache([AttentionSpec(0, 1, 1, 1, 1.0)], (0, 0), num_pages, torch.float32, torch.device("cpu"))
    return Scheduler(cache, PagePool(num_pages), EngineConfig(**options))


def make_request(name, prompt, limit=8):
    return Request(name, list(prompt), SamplingParams(), 0, limit, frozenset())


def play(scheduler, check=lambda chunks: None):
    """One step, as `Rollouts` does it, with token 1 for everyone; the requests that have ended."""
    chunks = scheduler.next_chunks()
    check(chunks)
    ended = []
    for chunk in chunks:
        scheduler.advance(chunk)
    for chunk in chunks:
        if chunk.draws:
            for request in (chunk.request, *scheduler.fork(chunk.request)):
                if (reason := request.accept(Draw(1, 0.0), "v")) is not None:
                    scheduler.finish(request, reason)
                    ended.append(request)
    return ended


def names(requests):
    return [request.id for request in requests]


def check_invariants(scheduler, chunks):
    requests = [chunk.request for chunk in chunks]
    assert len({id(request) for request in requests}) == len(requests) <= scheduler.max_batch_size
    assert sum(chunk.end - chunk.start for chunk in chunks) <= scheduler.max_step_tokens
    assert all(request in scheduler.running for request in requests)
    assert not {*map(id, scheduler.running)} & {*map(id, scheduler.waiting)}
    for chunk in chunks:
        assert 0 <= chunk.start < chunk.end <= len(chunk.request.tokens)
        assert len(chunk.request.pages) * PAGE_SIZE >= chunk.end
    assert all(not request.pages and not request.computed for request in scheduler.waiting)
    for request in scheduler.running:
        assert len(set(request.pages)) == len(request.pages)
        assert 0 not in request.pages
    users = scheduler.pool._users
    held = [page for request in scheduler.running for page in request.pages]
    assert all(users[page] == held.count(page) for page in range(scheduler.pool.num_pages))


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic(seed):
    """Arrivals, groups, aborts, retractions and swaps at random: all requests end, all pages come back."""
    rng = random.Random(seed)
    max_batch_size = rng.choice([1, 3, 8])
    scheduler = make_scheduler(
        rng.choice([6, 9, 30]),
        max_batch_size=max_batch_size,
        max_step_tokens=max_batch_size * rng.choice([1, 5]),
        prefix_cache=rng.random() < 0.7,
    )
    everyone, ended = [], []
    for step in range(300):
        if step < 150 and rng.random() < 0.4:
            prompt = [rng.randrange(2)] * rng.randrange(1, 40)
            first, *siblings = (
                make_request(f"{step}-{i}", prompt, rng.randrange(1, 30)) for i in range(rng.choice([1, 1, 5]))
            )
            first.siblings = siblings
            scheduler.waiting.append(first)
            everyone += [first, *siblings]
        if rng.random() < 0.05:
            scheduler.abort([r for r in everyone if rng.random() < 0.3])
        if rng.random() < 0.05:
            scheduler.forget_prefixes()
        if rng.random() < 0.05 and scheduler.running:
            scheduler.retract(scheduler.running[-1])
        ended += play(scheduler, lambda chunks: check_invariants(scheduler, chunks))
    for _ in range(3000):
        ended += play(scheduler, lambda chunks: check_invariants(scheduler, chunks))
    assert scheduler.num_unfinished == 0
    assert all(request.finished for request in everyone)
    aborted = [request for request in everyone if request.finish_reason == "abort"]
    assert len({*map(id, ended)}) == len(ended) == len(everyone) - len(aborted)
    assert all(request.num_new == request.limit for request in ended)
    assert scheduler.pool.num_available == scheduler.pool.num_pages - 1


def test_running_requests_decode_while_a_long_prompt_comes_in_chunks():
    scheduler = make_scheduler(40, max_batch_size=4, max_step_tokens=10)
    scheduler.waiting += [make_request("short", [1] * 4), make_request("long", [2] * 30)]
    seen = []
    for _ in range(5):
        play(scheduler, lambda chunks: seen.append([(c.request.id, c.start, c.end) for c in chunks]))
    assert seen == [
        [("short", 0, 4), ("long", 0, 6)],
        [("short", 4, 5), ("long", 6, 15)],
        [("short", 5, 6), ("long", 15, 24)],
        [("short", 6, 7), ("long", 24, 30)],
        [("short", 7, 8), ("long", 30, 31)],
    ]


def test_the_youngest_is_preempted_and_comes_back_first():
    scheduler = make_scheduler(5, prefix_cache=False)
    scheduler.waiting += [make_request(name, [1] * 16, limit=30) for name in ("a", "b", "c")]
    play(scheduler)
    assert names(scheduler.running) == ["a", "b", "c"]
    play(scheduler)  # a needs a second page, and so does b
    assert (names(scheduler.running), names(scheduler.waiting)) == (["a", "b"], ["c"])
    ended = []
    while scheduler.num_unfinished:
        ended += play(scheduler)
    assert names(ended) == ["a", "b", "c"]


def test_nothing_is_admitted_in_a_step_that_preempts():
    scheduler = make_scheduler(4, prefix_cache=False)
    scheduler.waiting += [make_request("a", [1] * 16), make_request("b", [1] * 31), make_request("c", [1])]
    play(scheduler)
    assert names(scheduler.running) == ["a", "b"]
    play(scheduler)
    assert (names(scheduler.running), names(scheduler.waiting)) == (["a"], ["b", "c"])


def test_order_of_arrival_is_kept_by_a_retraction_of_all():
    scheduler = make_scheduler(30)
    scheduler.waiting += [make_request(name, [1] * 5) for name in "abcd"]
    play(scheduler)
    for request in reversed(scheduler.running):
        scheduler.retract(request)
    assert names(scheduler.waiting) == ["a", "b", "c", "d"]


def make_group(count, length=20):
    first, *siblings = (make_request(f"{i}", range(length)) for i in range(count))
    first.siblings = siblings
    return first


def test_a_fork_shares_full_pages_and_copies_the_last():
    scheduler = make_scheduler(30)
    scheduler.waiting.append(make_group(3))
    play(scheduler)
    pages = [request.pages for request in scheduler.running]
    assert len({tuple(one[:1]) for one in pages}) == 1
    assert len({tuple(one[1:]) for one in pages}) == 3
    assert 30 - 1 - scheduler.pool.num_available == 4


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    scheduler = make_scheduler(30)
    scheduler.waiting.append(make_group(3, length=32))
    play(scheduler)
    assert len({tuple(request.pages) for request in scheduler.running}) == 1


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_siblings_that_find_no_seat_wait_for_one_of_them(prefix_cache):
    scheduler = make_scheduler(30, max_batch_size=2, prefix_cache=prefix_cache)
    scheduler.waiting.append(make_group(5))
    play(scheduler)
    assert names(scheduler.running) == ["0", "1"]
    assert names(scheduler.waiting) == ["2"]
    assert names(scheduler.waiting[0].siblings) == ["3", "4"]
    assert scheduler.num_unfinished == 5
    ended = []
    while scheduler.num_unfinished:
        ended += play(scheduler, lambda chunks: check_invariants(scheduler, chunks))
    assert sorted(names(ended)) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("running", [True, False], ids=["running", "waiting"])
def test_the_next_sibling_takes_the_place_of_an_aborted_first(running):
    scheduler = make_scheduler(30, max_batch_size=4, max_step_tokens=8)
    group = make_group(4)
    second = group.siblings[0]
    scheduler.waiting.append(group)
    if running:
        play(scheduler)
        assert names(scheduler.running) == ["0"]
    scheduler.abort([group, group.siblings[1]])
    assert (names(scheduler.running), names(scheduler.waiting), names(second.siblings)) == ([], ["1"], ["3"])
    ended = []
    while scheduler.num_unfinished:
        ended += play(scheduler)
    assert names(ended) == ["1", "3"]
    assert scheduler.pool.num_available == 29


def test_a_new_version_ends_sharing_until_a_request_is_computed_anew():
    scheduler = make_scheduler(30)
    scheduler.waiting.append(make_request("a", range(20), limit=60))
    play(scheduler)
    assert scheduler.pool.num_cached == 1
    scheduler.forget_prefixes()
    for _ in range(20):
        play(scheduler)
    assert scheduler.pool.num_cached == 0
    scheduler.retract(scheduler.running[0])
    play(scheduler)
    assert scheduler.pool.num_cached == 2
