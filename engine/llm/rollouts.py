"""`Rollouts`: runs requests step by step. Any thread may drive it; commits and pauses come between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Literal

import torch
from msgspec import Struct
from torch import Tensor

from ...weight_sync import Policy
from ..config import EngineConfig
from ..errors import AsleepError, ClosedError, NonFiniteError
from ..step_gate import StepGate
from .decoder import Decoder
from .forward import cache_dtype, make_forward
from .kv_cache import KVCache
from .likelihoods import Likelihoods
from .page_pool import PAGE_SIZE, PagePool
from .paged_attention import Span
from .request import Request
from .sampler import Draw, Draws, sample
from .scheduler import Chunk, Scheduler
from .transfers import upload

PauseMode = Literal["keep", "retract", "abort"]
LOGIT_ROWS = 256  # rows of logits over the vocabulary at a time, for prompt log-probs
POLL_SECONDS = 0.02  # how often a blocked driver looks whether it may go on


class Launched(Struct, frozen=True):
    """A step that the device is at: whose tokens it draws, and by which version of the weights."""

    requests: list[Request]
    draws: Draws
    version: str


class Rollouts:
    """The requests in flight, their scheduler and their KV cache.

    `run` drives steps in the calling thread until its own requests end; `serve` starts a thread that drives whatever
    is submitted. Both may be at work at once.
    """

    def __init__(self, model: Decoder, policy: Policy, num_pages: int, config: EngineConfig) -> None:
        self.model, self.policy = model, policy
        self.gate = StepGate()
        dtype = cache_dtype(model, config)
        self.cache = KVCache(model.attention_specs, model.routing, num_pages, dtype, model.device)
        self.forward = make_forward(model, self.cache, config)
        self.scheduler = Scheduler(self.cache, PagePool(num_pages), config)
        self.looks_ahead = model.device.type == "cuda" if config.overlap is None else config.overlap
        self._launched: deque[Launched] = deque()  # steps whose tokens are not taken in yet
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
        with self.visit():
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

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Between two steps, when all tokens that were drawn have been taken in."""
        with self.gate.visit():
            self.settle()
            yield

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
                    with self.visit():
                        self._end(lambda request: True, error)

    def _is_busy(self) -> bool:
        """Whether requests are in flight; between two steps, since a step moves them from queue to queue."""
        with self.gate.visit():
            return not self._closed and bool(self._inbox or self.scheduler.num_unfinished)

    def step(self) -> None:
        """Launch one step of all requests in flight, and take in the tokens that it draws.

        With `looks_ahead` the tokens are taken in after the next step has been launched, so that the device never
        waits for the host: what that step needs of them it finds on the device. A request that they end has then been
        computed one token too far, which nobody sees.
        """
        self._take_inbox()
        with self._all_or_forgotten():
            if not self._may_look_ahead():
                self.settle()
            launched = self._launch()
            self.settle(leave=1 if launched and self._may_look_ahead() else 0)
        if not self.scheduler.running:
            self._launched.clear()  # of ended requests only

    def _may_look_ahead(self) -> bool:
        """Whether a step can be made before the tokens of the last one are known."""
        scheduler = self.scheduler
        return (
            self.looks_ahead
            and scheduler.has_room_ahead  # else somebody is preempted, who may have ended
            and not any(request.params.penalizes for request in scheduler.running)
        )

    def _launch(self) -> bool:
        """Queue the next step on the device; False where there is none."""
        chunks = self.scheduler.next_chunks()
        if not chunks:
            return False
        with torch.inference_mode():
            hidden = self._compute(chunks)
            self._draw([chunk for chunk in chunks if chunk.draws], _last_rows(chunks, hidden))
        return True

    def settle(self, leave: int = 0) -> None:
        """Take in the tokens of launched steps, the oldest first, until no more than `leave` are under way."""
        with self._all_or_forgotten():
            while len(self._launched) > leave:
                step = self._launched.popleft()
                for request, draw in zip(step.requests, step.draws.read(), strict=True):
                    request.in_flight -= 1
                    if not request.finished:  # by the token before
                        self._accept(request, draw, step.version)

    @contextmanager
    def _all_or_forgotten(self) -> Iterator[None]:
        """Where a step is interrupted, what is in flight is given up: it is computed and drawn again, and alike."""
        try:
            yield
        except BaseException:
            self._launched.clear()
            for request in self.scheduler.running:
                request.in_flight, request.computed = 0, min(request.computed, len(request.tokens))
            raise

    def _accept(self, request: Request, draw: Draw | NonFiniteError, version: str) -> None:
        if isinstance(draw, NonFiniteError):  # of one request: the others go on
            request.error = draw
            self.scheduler.finish(request, "abort")
        elif (reason := request.accept(draw, version)) is not None:
            self.scheduler.finish(request, reason)
        _notify(request)

    def _compute(self, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states of all chunks' tokens, one below the other."""
        spans = [Span(c.request.pages, c.start, c.end) for c in chunks]
        positions = [at for c in chunks for at in range(c.start, c.end)]
        drawn = self._launched[-1].draws.ids if self._launched else None
        hidden = self.forward([id for c in chunks for id in _ids(c)], positions, spans, drawn)
        row = 0
        for chunk in chunks:
            scores = self._score_prompt(chunk, hidden[row : row + len(chunk)]) if chunk.scores else []
            self.scheduler.advance(chunk)
            chunk.request.prompt_logprobs += scores
            row += len(chunk)
        return hidden

    def _draw(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Draw for the chunks' requests, and for siblings that go on from them; hidden [num_chunks, hidden_size]."""
        if not chunks:
            return
        logits = self.model.logits(hidden)
        rows, requests = list[int](), list[Request]()
        for row, chunk in enumerate(chunks):
            group = [chunk.request, *self.scheduler.fork(chunk.request)]
            requests += group
            rows += [row] * len(group)
        if len(rows) > len(chunks):
            logits = logits[upload(rows, logits.device)]
        version = self.policy.version
        assert version is not None
        self._launched.append(Launched(requests, sample(logits, requests), version))
        for at, request in enumerate(requests):
            request.in_flight, request.drawn_at = request.in_flight + 1, at

    def _score_prompt(self, chunk: Chunk, hidden: Tensor) -> list[Tensor]:
        """Log-probs of the prompt tokens that follow the chunk's."""
        request, scores = chunk.request, list[Tensor]()
        following = request.prompt[chunk.start + 1 : chunk.end + 1]
        for start in range(0, len(following), LOGIT_ROWS):
            ids = upload(following[start : start + LOGIT_ROWS], hidden.device)[:, None]
            logits = self.model.logits(hidden[start : start + len(ids)]).float() / request.params.prompt_temperature
            scores.append(Likelihoods(logits).logprobs(ids)[:, 0].cpu())
        return scores

    # between steps

    def weights_changed(self) -> None:
        """Called inside a commit: cached prefixes belong to the weights before."""
        self.scheduler.forget_prefixes()

    def pause(self, mode: PauseMode) -> None:
        """Stop between two steps. "keep": running requests keep their KV; "retract": they give it up and wait, to be
        computed again; "abort": all requests end with what they have."""
        with self.visit():
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
        with self.visit():
            if self.cache.asleep:
                return
            self._retract_all()
            self.scheduler.pool.forget_prefixes()
            self.cache.free()

    def forget_graphs(self) -> None:
        """Memory moves: decoding steps are captured anew."""
        with self.visit():
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


def _ids(chunk: Chunk) -> list[int]:
    """The chunk's token ids; one in flight as the step expects it: -1 - its place among the last step's draws."""
    ids = chunk.request.tokens[chunk.start : chunk.end]
    return ids if len(ids) == len(chunk) else [*ids, -1 - chunk.request.drawn_at]


def _last_rows(chunks: Sequence[Chunk], hidden: Tensor) -> Tensor:
    """Of hidden states [num_tokens, hidden_size], the last one of each chunk that draws."""
    ends = list(accumulate(len(chunk) for chunk in chunks))
    rows = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.draws]
    return hidden if len(rows) == len(hidden) else hidden[upload(rows, hidden.device)]


def _notify(request: Request) -> None:
    if request.on_change is not None:
        request.on_change(request)
