"""`Request`: one completion under way, from its prompt to its last token."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct, field
from torch import Tensor

from ..config import SamplingParams
from ..types import FinishReason, VersionSpan
from .page_pool import PAGE_SIZE, ROOT
from .sampler import Draw, seeded_uniforms
from .text import TextStream


class Request(Struct, eq=False):
    """One completion. `tokens` is the prompt and what has been drawn; of these, `computed` have keys and values.

    `siblings` wait for the prompt that this request computes, and then go on from a copy of its last page.
    `shareable`: all of its keys and values come from the weights that serve now, so its pages may be cached.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    limit: int  # new tokens at the most
    stop_ids: frozenset[int]
    text: TextStream | None = None  # kept where text is streamed or may hold a stop string
    on_change: Callable[[Request], None] | None = None  # called after every step that changed it
    siblings: list[Request] = field(default_factory=list)

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    prompt_logprobs: list[Tensor] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # set last: another thread may look for it
    stopped_by: int | str | None = None

    in_flight: int = 0  # tokens drawn that have not been read yet
    drawn_at: int = 0  # where the last of them stands among its step's draws

    pages: list[int] = field(default_factory=list)
    computed: int = 0
    shareable: bool = True
    node: int = ROOT  # of the prefix cache, for the first `num_shared` pages
    num_shared: int = 0
    cached_tokens: int | None = None  # of the prompt, found in the prefix cache; None before admission
    num_preemptions: int = 0
    wants_routed: bool = False
    routed: Tensor | None = None  # int16 [computed, num_moe_layers, top_k], once it has ended
    error: Exception | None = None
    uniforms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def num_tokens(self) -> int:
        """Tokens that there are, those in flight included."""
        return len(self.tokens) + self.in_flight

    @property
    def all_drawn(self) -> bool:
        """Whether no token is left to draw: the last one is in flight."""
        return self.num_new + self.in_flight >= self.limit

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs and sum(map(len, self.prompt_logprobs)) < len(self.prompt) - 1

    def uniform(self) -> float:
        """What drives the next draw: the i-th number of the request's own stream."""
        if not self.uniforms:
            self.uniforms = seeded_uniforms(self.seed, self.limit).tolist()
        return self.uniforms[self.num_new + self.in_flight]

    def accept(self, draw: Draw, version: str) -> FinishReason | None:
        """Take the next token; why it is the last one (a stop token, a stop string, the limit), or None."""
        at = self.num_new
        self.tokens.append(draw.token)
        self.logprobs.append(draw.logprob)
        if draw.top is not None:
            self.top.append(draw.top)
        if self.params.sampling_mask:
            self.masks.append(draw.mask)
        if self.spans and self.spans[-1].version == version:
            self.spans[-1] = VersionSpan(version, self.spans[-1].start, at + 1)
        else:
            self.spans.append(VersionSpan(version, at, at + 1))
        stop = None if self.text is None else self.text.push(draw.token)
        if draw.token in self.stop_ids:
            self.stopped_by = draw.token
            return "stop"
        if stop is not None:
            self.stopped_by = stop
            return "stop"
        return "length" if self.num_new == self.limit else None

    def notify(self) -> None:
        """Tell whoever follows this request that it has changed."""
        if self.on_change is not None:
            self.on_change(self)

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages to add so that `num_tokens` tokens have room."""
        return max(0, -(-num_tokens // PAGE_SIZE) - len(self.pages))

    def drop_pages(self) -> list[int]:
        """Give up all keys and values: they are computed again later."""
        pages, self.pages = self.pages, []
        self.computed, self.node, self.num_shared, self.shareable = 0, ROOT, 0, True
        return pages
