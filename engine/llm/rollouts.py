"""`Rollouts`: runs requests step by step. Any thread may drive it; commits and pauses come between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ...weight_sync import Policy
from ..config import EngineConfig
from ..errors import AsleepError, ClosedError, NonFiniteError
from ..step_gate import StepGate
from .decoder import Decoder
from .forward import make_forward
from .kv_cache import KVCache
from .likelihoods import Likelihoods
from .page_pool import PAGE_SIZE, PagePool
from .paged_attention import Span
from .request import Request
from .sampler import Draw, sample
from .scheduler import Chunk, Scheduler

PauseMode = Literal["keep", "retract", "abort"]
LOGIT_ROWS = 256  # rows of logits over the vocabulary at a time, for prompt log-probs
POLL_SECONDS = 0.02  # how often a blocked driver looks whether it may go on


class Rollouts:
    """The requests in flight, their scheduler and their KV cache.

    `run` drives steps in the calling thread until its own requests end; `serve` starts a thread that drives whatever
    is submitted. Both may be at work at once.
    """

    def __init__(self, model: Decoder, policy: Policy, num_pages: int, config: EngineConfig) -> None:
        self.model, self.policy = model, policy
        self.gate = StepGate()
        self.cache = KVCache(model.attention_specs, model.routing, num_pages, model.dtype, model.device)
        self.forward = make_forward(model, self.cache, model.capability, config)
        self.scheduler = Scheduler(self.cache, PagePool(num_pages), config)
        self.paused = False
        self.pausing_thread: int | None = None
        self._inbox: deque[Request] = deque()
        self._work = threading.Event()
        self._server: threading.Thread | None = None
        self._closed = False

    # requests

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests (siblings come with the first of their group); never waits for a step."""
        self._inbox.extend(requests)
        self._work.set()
        if self._closed:  # looked at after queueing: what was queued before is ended by `close`
            raise ClosedError("this engine has been closed; open a new one")

    def run(self, requests: Sequence[Request], on_step: Callable[[], None] | None = None) -> None:
        """Submit requests and drive steps until they and their siblings have ended; on an error they are aborted."""
        everyone = [one for request in requests for one in (request, *request.siblings)]
        try:
            self.submit(requests)
            for request in everyone:
                while not request.finished:
                    self._drive(lambda request=request: request.finished)
                    if on_step is not None:
                        on_step()
                if request.error is not None:
                    raise request.error
        except BaseException:
            mine = {id(request) for request in everyone}
            self.abort(lambda request: id(request) in mine)
            raise

    def abort(self, chosen: Callable[[Request], bool]) -> None:
        """End the requests that `chosen` picks among all in flight; they keep what they have."""
        with self.gate.visit():
            self._end(chosen)

    def _end(self, chosen: Callable[[Request], bool], error: Exception | None = None) -> None:
        self._take_inbox()
        gone = [request for request in self._in_flight() if chosen(request)]
        for request in gone:
            request.error = error  # first: whoever polls an ended request must find it
        self.scheduler.abort(gone)
        for request in gone:
            _notify(request)

    def _in_flight(self) -> Iterator[Request]:
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            yield from (request, *request.siblings)

    def _take_inbox(self) -> None:
        while self._inbox:
            self.scheduler.waiting.append(self._inbox.popleft())

    # driving

    def _drive(self, needless: Callable[[], bool]) -> None:
        """One step, or a short wait while the engine is paused or asleep; nothing once it is `needless`."""
        with self.gate.step(needless) as entered:
            if not entered:
                return
            if self._may_step():
                self.step()
                return
        threading.Event().wait(POLL_SECONDS)

    def _may_step(self) -> bool:
        if self.paused or self.cache.asleep:
            return False
        try:
            self.policy.check_servable()
        except AsleepError:
            return False
        return True

    def serve(self) -> None:
        """Drive submitted requests in a thread of the engine's own, from now on."""
        if self._server is None:
            self._server = threading.Thread(target=self._serve, name="rollmill-rollouts", daemon=True)
            self._server.start()

    def _serve(self) -> None:
        while not self._closed:
            self._work.wait()
            self._work.clear()
            while self._is_busy():
                try:
                    self._drive(lambda: self._closed)
                except Exception as error:  # whoever waits for these requests must hear of it
                    with self.gate.visit():
                        self._end(lambda request: True, error)

    def _is_busy(self) -> bool:
        """Whether requests are in flight; between two steps, since a step moves them from queue to queue."""
        with self.gate.visit():
            return not self._closed and bool(self._inbox or self.scheduler.num_unfinished)

    def step(self) -> None:
        """Compute one step of all requests in flight and draw their next tokens."""
        self._take_inbox()
        chunks = self.scheduler.next_chunks()
        if not chunks:
            return
        with torch.inference_mode():
            draws = self._compute(chunks)
        version = self.policy.version
        assert version is not None
        for request, draw in draws:  # outside of inference mode: completions are made here, and trainers use them
            if isinstance(draw, NonFiniteError):  # of one request: the others go on
                request.error = draw
                self.scheduler.finish(request, "abort")
            elif (reason := request.accept(draw, version)) is not None:
                self.scheduler.finish(request, reason)
            _notify(request)

    def _compute(self, chunks: Sequence[Chunk]) -> list[tuple[Request, Draw | NonFiniteError]]:
        spans = [Span(c.request.pages, c.start, c.end) for c in chunks]
        ids = [token for c in chunks for token in c.request.tokens[c.start : c.end]]
        positions = [at for c in chunks for at in range(c.start, c.end)]
        hidden = self.forward(ids, positions, spans)
        for chunk, rows in zip(chunks, hidden.split([c.end - c.start for c in chunks]), strict=True):
            scores = self._score_prompt(chunk, rows)
            self.scheduler.advance(chunk)
            chunk.request.prompt_logprobs += scores
        return self._draw(chunks, hidden)

    def _draw(self, chunks: Sequence[Chunk], hidden: Tensor) -> list[tuple[Request, Draw | NonFiniteError]]:
        ends = torch.tensor([c.end - c.start for c in chunks], device=hidden.device).cumsum(0) - 1
        last = [row for row, chunk in enumerate(chunks) if chunk.draws]
        if not last:
            return []
        logits = self.model.logits(hidden[ends[last]])
        rows, requests = [], []
        for row, index in enumerate(last):
            group = [chunks[index].request, *self.scheduler.fork(chunks[index].request)]
            requests += group
            rows += [row] * len(group)
        if len(rows) > len(last):
            logits = logits[rows]
        return list(zip(requests, sample(logits, requests), strict=True))

    def _score_prompt(self, chunk: Chunk, hidden: Tensor) -> list[Tensor]:
        """Log-probs of the prompt tokens that follow the chunk's, where they are wanted."""
        request, scores = chunk.request, list[Tensor]()
        if not request.wants_prompt_logprobs:
            return scores
        following = request.prompt[chunk.start + 1 : chunk.end + 1]
        for start in range(0, len(following), LOGIT_ROWS):
            ids = torch.tensor(following[start : start + LOGIT_ROWS], device=hidden.device)[:, None]
            logits = self.model.logits(hidden[start : start + len(ids)]) / request.params.prompt_temperature
            scores.append(Likelihoods(logits).logprobs(ids)[:, 0].cpu())
        return scores

    # between steps

    def weights_changed(self) -> None:
        """Called inside a commit: cached prefixes belong to the weights before."""
        self.scheduler.forget_prefixes()

    def pause(self, mode: PauseMode) -> None:
        """Stop between two steps. "keep": running requests keep their KV; "retract": they give it up and wait, to be
        computed again; "abort": all requests end with what they have."""
        with self.gate.visit():
            self.paused, self.pausing_thread = True, threading.get_ident()
            self._take_inbox()
            if mode == "retract":
                self._retract_all()
            if mode == "abort":
                self._end(lambda request: True)

    def resume(self) -> None:
        self.paused, self.pausing_thread = False, None
        self._work.set()

    def _retract_all(self) -> None:
        for request in reversed(self.scheduler.running):
            self.scheduler.retract(request)

    def free_cache(self) -> None:
        """Give the KV cache's memory back; running requests are computed again once it is there again."""
        with self.gate.visit():
            if self.cache.asleep:
                return
            self._retract_all()
            self.scheduler.pool.forget_prefixes()
            self.cache.free()

    def forget_graphs(self) -> None:
        """Memory moves: decoding steps are captured anew."""
        with self.gate.visit():
            if self.forward.graphs is not None:
                self.forward.graphs.forget()

    def allocate_cache(self) -> None:
        with self.gate.visit():
            self.cache.allocate()

    def info(self) -> dict[str, int | bool]:
        """Figures of the moment, for people."""
        pool = self.scheduler.pool
        return {
            "paused": self.paused,
            "requests": self.scheduler.num_unfinished + sum(1 + len(first.siblings) for first in tuple(self._inbox)),
            "kv_cache_bytes": self.cache.num_bytes,
            "kv_cache_tokens": (pool.num_pages - 1) * PAGE_SIZE,
            "kv_cache_tokens_free": pool.num_available * PAGE_SIZE,
            "prefix_cache_tokens": pool.num_cached * PAGE_SIZE,
            "preemptions": self.scheduler.num_preemptions,
        }

    def close(self) -> None:
        """End all requests and the engine's thread."""
        self._closed = True
        self.abort(lambda request: True)
        self._work.set()


def _notify(request: Request) -> None:
    if request.on_change is not None:
        request.on_change(request)
