"""`Scheduler`: which tokens the next step computes. Continuous batching, chunked prefill, preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from msgspec import Struct

from ..config import EngineConfig
from ..types import FinishReason
from .kv_cache import KVCache
from .page_pool import PAGE_SIZE, PagePool
from .request import Request


class Chunk(Struct, frozen=True):
    """Compute tokens [start, end) of a request in this step; the last token of a request asks for a draw."""

    request: Request
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    @property
    def scores(self) -> bool:
        """Whether log-probs of the prompt are wanted of it."""
        return self.request.wants_prompt_logprobs

    @property
    def draws(self) -> bool:
        return self.end == self.request.num_tokens


class Scheduler:
    """Requests wait in order of arrival, then run until they end.

    A step takes what running requests need (one token each while they decode, the rest of a long prompt in chunks),
    then admits waiting ones while `max_batch_size`, `max_step_tokens` and free pages allow. When pages run out, the
    youngest running request gives its pages back and waits, first in line, to be computed again.
    """

    def __init__(self, cache: KVCache, pool: PagePool, config: EngineConfig) -> None:
        self.cache, self.pool = cache, pool
        self.max_batch_size, self.max_step_tokens = config.max_batch_size, config.max_step_tokens
        self.prefix_cache = config.prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def num_unfinished(self) -> int:
        return sum(1 + len(request.siblings) for request in (*self.waiting, *self.running))

    def next_chunks(self) -> list[Chunk]:
        """The next step's work; empty when there is none."""
        chunks: list[Chunk] = []
        budget, preempted = self.max_step_tokens, self.num_preemptions
        at = 0
        while at < len(self.running) and budget:
            request = self.running[at]
            if not request.all_drawn:
                chunk = self._chunk(request, budget)
                if not self._make_room(request, chunk.end):
                    continue  # it runs no more
                chunks.append(chunk)
                budget -= chunk.end - chunk.start
            at += 1
        while self.waiting and len(self.running) < self.max_batch_size and budget:
            if self.num_preemptions > preempted or not self._admit(self.waiting[0]):
                break
            chunk = self._chunk(self.running[-1], budget)
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
        return chunks

    @staticmethod
    def _chunk(request: Request, budget: int) -> Chunk:
        # An interrupted step may have computed the last token and not drawn: it is computed once more.
        start = min(request.computed, request.num_tokens - 1)
        return Chunk(request, start, min(request.num_tokens, start + budget))

    def _admit(self, request: Request) -> bool:
        """Give a waiting request the pages of all tokens it has, cached ones first; False if there are too few."""
        prefix = None if request.wants_prompt_logprobs else self.pool.find(request.tokens)
        shared = [] if prefix is None else prefix.pages
        self.pool.share(shared)
        request.pages = list(shared)
        pages = self._take(request.num_pages_for(len(request.tokens)))
        if pages is None:
            self.pool.release(request.drop_pages())
            return False
        request.pages += pages
        if prefix is not None:
            request.computed, request.node, request.num_shared = len(shared) * PAGE_SIZE, prefix.node, len(shared)
        if request.cached_tokens is None:
            request.cached_tokens = request.computed
        self.running.append(self.waiting.popleft())
        return True

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Pages for the first `num_tokens` tokens; younger requests are preempted for them, then this one itself."""
        while (pages := self._take(request.num_pages_for(num_tokens))) is None:
            victim = self.running[-1]
            self.retract(victim)
            if victim is request:
                return False
        request.pages += pages
        return True

    def _take(self, count: int) -> list[int] | None:
        pages = self.pool.take(count)
        try:
            if pages and self.cache.clears_pages:
                self.cache.clear(pages)
        except BaseException:
            self.pool.release(pages or [])
            raise
        return pages

    @property
    def has_room_ahead(self) -> bool:
        """Whether the next step needs nobody's pages but free ones."""
        running = (request for request in self.running if not request.all_drawn)
        return self.pool.num_available >= sum(request.num_pages_for(request.num_tokens) for request in running)

    def retract(self, request: Request) -> None:
        """Take a running request's pages; it waits, first in line, and is computed again."""
        self.running.remove(request)
        self.pool.release(request.drop_pages())
        if request.wants_prompt_logprobs:  # scored in part: from the start again
            request.prompt_logprobs.clear()
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def advance(self, chunk: Chunk) -> None:
        """A chunk has been computed: its full pages may serve as a prefix for others, once their tokens are known."""
        request = chunk.request
        request.computed = chunk.end
        if not (request.shareable and self.prefix_cache):
            return
        for page in range(request.num_shared, min(request.computed, len(request.tokens)) // PAGE_SIZE):
            tokens = request.tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            request.node = self.pool.add(request.node, tokens, request.pages[page])
            request.num_shared = page + 1

    def fork(self, request: Request) -> list[Request]:
        """Let the siblings that find room go on from this request's prompt; the others wait, one for all of them.

        Full pages are shared, the last one, if it is not full, is copied.
        """
        forked: list[Request] = []
        full, rest = divmod(request.computed, PAGE_SIZE)
        while request.siblings:
            sibling = request.siblings[0]
            own = self._take(1 if rest else 0) if len(self.running) < self.max_batch_size else None
            if own is None:
                break
            self.pool.share(request.pages[:full])
            sibling.pages = request.pages[:full] + own
            for page in own:
                self.cache.copy(request.pages[full], page)
            sibling.computed, sibling.shareable = request.computed, request.shareable
            sibling.node, sibling.num_shared = request.node, request.num_shared
            sibling.cached_tokens = request.computed
            sibling.prompt_logprobs = list(request.prompt_logprobs)
            self.running.append(request.siblings.pop(0))
            forked.append(sibling)
        if request.siblings:
            first, *others = request.siblings
            first.siblings, request.siblings = others, []
            self.waiting.appendleft(first)
        return forked

    def finish(self, request: Request, reason: FinishReason) -> None:
        """A running request has ended: keep what was routed, give its pages back."""
        self.running.remove(request)
        self._close(request, reason)

    def abort(self, chosen: Iterable[Request]) -> None:
        """End requests wherever they are. The sibling after an aborted first one takes its place."""
        gone = {id(request) for request in chosen if not request.finished}
        for request in [*self.waiting, *self.running]:
            ended = [sibling for sibling in request.siblings if id(sibling) in gone]
            request.siblings = [sibling for sibling in request.siblings if id(sibling) not in gone]
            if id(request) in gone:
                ended.append(request)
                self._replace(request)
            for one in ended:
                self._close(one, "abort")

    def _replace(self, request: Request) -> None:
        heir = request.siblings[0] if request.siblings else None
        if heir is not None:
            heir.siblings, request.siblings = request.siblings[1:], []
        if request in self.running:
            self.running.remove(request)
            if heir is not None:
                self.waiting.appendleft(heir)
            return
        at = self.waiting.index(request)
        del self.waiting[at]
        if heir is not None:
            self.waiting.insert(at, heir)

    def _close(self, request: Request, reason: FinishReason) -> None:
        request.computed = min(request.computed, len(request.tokens) - 1)  # a step ahead may have gone beyond
        if request.wants_routed:
            request.routed = self.cache.routed_of(request.pages, request.computed)
        self.pool.release(request.drop_pages())
        request.finish_reason = reason

    def forget_prefixes(self) -> None:
        """The weights have changed: running requests keep their pages, but share them no more."""
        self.pool.forget_prefixes()
        for request in self.running:
            request.shareable = False
