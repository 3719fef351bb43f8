"""`Steps`: computes steps on the device and takes in the tokens that they draw, one step late where it looks ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from msgspec import Struct
from torch import Tensor

from ...weight_sync import Policy
from ..errors import NonFiniteError
from .decoder import Decoder
from .forward import Forward
from .paged_attention import Span
from .request import Request
from .sampler import Draw, Draws, EachDraws, sample, score
from .scheduler import Chunk, Scheduler
from .step_stream import StepStream
from .transfers import upload

LOGIT_ROWS = 256  # rows of logits over the vocabulary at a time, for prompt log-probs


class Launched(Struct, frozen=True):
    """A step that the device is at: whose tokens it draws, and by which version of the weights."""

    requests: list[Request]
    draws: Draws | EachDraws
    version: str


class Steps:
    """One after another, of whatever the scheduler has; never two at once."""

    def __init__(
        self,
        model: Decoder,
        policy: Policy,
        forward: Forward,
        scheduler: Scheduler,
        *,
        looks_ahead: bool,
        batch_invariant: bool = False,
    ) -> None:
        self.model, self.policy, self.forward, self.scheduler = model, policy, forward, scheduler
        self.looks_ahead, self.batch_invariant = looks_ahead, batch_invariant
        self.stream = StepStream(model.device)
        self._launched: deque[Launched] = deque()  # steps whose tokens are not taken in yet

    def step(self) -> None:
        """Launch one step of all running requests, and take in the tokens that it draws.

        With `looks_ahead` the tokens are taken in after the next step has been launched, so that the device never
        waits for the host: what that step needs of them it finds on the device. A request that they end has then been
        computed one token too far, which nobody sees.
        """
        with self._all_or_forgotten(), self.stream.entered():
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
        with self._all_or_forgotten(), self.stream.entered():
            while len(self._launched) > leave:
                step = self._launched.popleft()
                for request, draw in zip(step.requests, step.draws.read(), strict=True):
                    request.in_flight -= 1
                    if not request.finished:  # by the token before
                        self._accept(request, draw, step.version)

    def finish(self) -> None:
        """Take in all tokens, and wait until the device is at no step: then nobody reads weights or cache."""
        self.settle()
        self.stream.wait()

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
        request.notify()

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
        self._launched.append(Launched(requests, sample(logits, requests, apart=self.batch_invariant), version))
        for at, request in enumerate(requests):
            request.in_flight, request.drawn_at = request.in_flight + 1, at

    def _score_prompt(self, chunk: Chunk, hidden: Tensor) -> list[Tensor]:
        """Log-probs of the prompt tokens that follow the chunk's."""
        request, scores = chunk.request, list[Tensor]()
        following = request.prompt[chunk.start + 1 : chunk.end + 1]
        for start in range(0, len(following), LOGIT_ROWS):
            ids = upload(following[start : start + LOGIT_ROWS], hidden.device)
            logits = self.model.logits(hidden[start : start + len(ids)])
            scores.append(score(logits, request.params.prompt_temperature, ids).cpu())
        return scores


def _ids(chunk: Chunk) -> list[int]:
    """The chunk's token ids; one in flight as the step expects it: -1 - its place among the last step's draws."""
    ids = chunk.request.tokens[chunk.start : chunk.end]
    return ids if len(ids) == len(chunk) else [*ids, -1 - chunk.request.drawn_at]


def _last_rows(chunks: Sequence[Chunk], hidden: Tensor) -> Tensor:
    """Of hidden states [num_tokens, hidden_size], the last one of each chunk that draws."""
    ends = list(accumulate(len(chunk) for chunk in chunks))
    rows = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.draws]
    return hidden if len(rows) == len(hidden) else hidden[upload(rows, hidden.device)]
