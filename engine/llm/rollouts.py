"""`Rollouts`: runs requests step by step. Any thread may drive it; commits and pauses come between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from ...weight_sync import Policy
from ..config import EngineConfig
from ..errors import AsleepError, ClosedError
from ..step_gate import StepGate
from .decoder import Decoder
from .forward import cache_dtype, make_forward
from .kv_cache import KVCache
from .page_pool import PAGE_SIZE, PagePool
from .request import Request
from .scheduler import Scheduler
from .steps import Steps

PauseMode = Literal["keep", "retract", "abort"]
POLL_SECONDS = 0.02  # how often a blocked driver looks whether it may go on


class Rollouts:
    """The requests in flight, their scheduler, their steps and their KV cache.

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
        looks_ahead = model.device.type == "cuda" if config.overlap is None else config.overlap
        self.steps = Steps(
            model,
            policy,
            self.forward,
            self.scheduler,
            looks_ahead=looks_ahead,
            batch_invariant=config.batch_invariant,
        )
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
            request.notify()

    def _in_flight(self) -> Iterator[Request]:
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            yield from (request, *request.siblings)

    def _take_inbox(self) -> None:
        while self._inbox:
            self.scheduler.waiting.append(self._inbox.popleft())

    # driving

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Between two steps, when all tokens that were drawn have been taken in and the device is at no step."""
        with self.gate.visit():
            self.steps.finish()
            yield

    @contextmanager
    def computing(self) -> Iterator[None]:
        """For what reads the weights between two steps, in their stream and after what the caller's holds; until the
        device has done it."""
        with self.gate.visit():
            self.steps.stream.follow()
            try:
                with self.steps.stream.entered():
                    yield
            finally:
                self.steps.stream.wait()

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
                except Exception as error:  # whoever waits for these requests must hear of it, be the device lost
                    with self.gate.visit():
                        self._end(lambda request: True, error)

    def _is_busy(self) -> bool:
        """Whether requests are in flight; between two steps, since a step moves them from queue to queue."""
        with self.gate.visit():
            return not self._closed and bool(self._inbox or self.scheduler.num_unfinished)

    def step(self) -> None:
        """Launch one step of all requests in flight, and take in tokens that were drawn."""
        self._take_inbox()
        self.steps.step()

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
            self.steps.stream.follow()  # it clears pages

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
        with self.gate.visit():
            try:
                self.steps.finish()
            finally:  # be the device lost, whoever waits must hear of it
                self._end(lambda request: True)
                self._work.set()
