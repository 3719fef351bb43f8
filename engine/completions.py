"""Prompts and parameters -> requests, and ended requests -> completions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import SamplingParams
from .errors import RequestError
from .llm.request import Request
from .llm.text import TextStream, decode
from .types import Completion, TopLogprobs


class Limits(Struct, frozen=True):
    """What a request must fit into: the vocabulary, the model's context, the KV cache (tokens)."""

    vocab_size: int
    max_position: int
    kv_cache_tokens: int


def each_params(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """One set of parameters for each prompt."""
    if params is None or isinstance(params, SamplingParams):
        default: SamplingParams = params or SamplingParams()
        return [default] * num_prompts
    if not isinstance(params, list | tuple) or not all(isinstance(one, SamplingParams) for one in params):
        raise RequestError(f"sampling parameters are SamplingParams or a list of them, got {_kinds(params)}")
    if len(params) != num_prompts:
        raise RequestError(f"{len(params)} sampling parameters for {num_prompts} prompts: give one, or one a prompt")
    return list(params)


def _kinds(params: Any) -> str:
    if not isinstance(params, list | tuple):
        return type(params).__name__
    return f"{type(params).__name__} of {', '.join(sorted({type(one).__name__ for one in params}))}"


class RequestMaker:
    """Makes requests: unique seeds where none is given, limits checked, one prompt's samples as siblings."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, eos: frozenset[int], limits: Limits, first_seed: int
    ) -> None:
        self.tokenizer, self.eos, self.limits = tokenizer, eos, limits
        self._seeds = itertools.count(first_seed)
        self._ids = itertools.count()

    def make(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        request_id: str | None = None,
        *,
        routed: bool = False,
        streamed: bool = False,
    ) -> list[Request]:
        """Every completion's request, prompt-major. Ids: `request_id` or a counter, then "-" and the index."""
        prefix = f"request-{next(self._ids)}" if request_id is None else request_id
        for index, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
            self._check(index, prompt, chosen)
        made: list[Request] = []
        for prompt, chosen in zip(prompts, params, strict=True):
            made += [
                self._one(f"{prefix}-{len(made) + i}", prompt, chosen, i, routed=routed, streamed=streamed)
                for i in range(chosen.n)
            ]
        return made

    def _check(self, index: int, prompt: list[int], params: SamplingParams) -> None:
        vocab = self.limits.vocab_size
        if len(prompt) > self.limits.kv_cache_tokens:
            raise RequestError(
                f"prompt {index} has {len(prompt)} tokens, but the KV cache holds {self.limits.kv_cache_tokens}: "
                "raise EngineConfig.kv_cache_tokens"
            )
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model folder has none: stop at token ids")
        wrong = [t for t in _named_tokens(params) if not 0 <= t < vocab]
        if wrong:
            raise RequestError(f"logit_bias, allowed_token_ids or stop: token {wrong[0]} is outside of 0..{vocab - 1}")
        if params.top_logprobs > vocab:
            raise RequestError(f"top_logprobs={params.top_logprobs}, but the vocabulary has {vocab} tokens")
        banned = {token for token, bias in params.logit_bias.items() if bias == -inf}
        if banned.issuperset(range(vocab) if params.allowed_token_ids is None else params.allowed_token_ids):
            raise RequestError("logit_bias bans every token that is allowed: leave at least one")

    def _one(
        self, name: str, prompt: list[int], params: SamplingParams, index: int, *, routed: bool, streamed: bool
    ) -> Request:
        text = None
        if self.tokenizer is not None and (streamed or params.stop_strings):
            text = TextStream(self.tokenizer, params.stop_strings)
        room = min(self.limits.max_position, self.limits.kv_cache_tokens + 1) - len(prompt)
        return Request(
            id=name,
            prompt=prompt,
            params=params,
            seed=next(self._seeds) if params.seed is None else params.seed + index,
            limit=min(params.max_new_tokens, room),
            stop_ids=params.stop_token_ids | (frozenset() if params.ignore_eos else self.eos),
            text=text,
            wants_routed=routed,
        )

    def complete(self, request: Request) -> Completion:
        """What an ended request gives back."""
        assert request.finish_reason is not None
        params, count = request.params, request.num_new
        return Completion(
            request_id=request.id,
            prompt_token_ids=list(request.prompt),
            token_ids=request.new_tokens,
            text=self._text(request),
            finish_reason=request.finish_reason,
            stopped_by=request.stopped_by,
            logprobs=None if params.logprobs is None else torch.tensor(request.logprobs),
            top_logprobs=_top_logprobs(request) if params.top_logprobs else None,
            prompt_logprobs=_prompt_logprobs(request) if params.prompt_logprobs else None,
            sampling_mask=[None if m is None else m.clone() for m in request.masks] if params.sampling_mask else None,
            weight_versions=request.spans,
            routed_experts=_routed_experts(request, len(request.prompt) + count - 1) if request.wants_routed else None,
            seed=request.seed,
            cached_tokens=request.cached_tokens or 0,
            num_preemptions=request.num_preemptions,
        )

    def _text(self, request: Request) -> str | None:
        if self.tokenizer is None:
            return None
        if request.text is not None and request.text.stopped_by is not None:
            return request.text.text
        return decode(self.tokenizer, request.new_tokens)


def _named_tokens(params: SamplingParams) -> Iterator[int]:
    yield from params.logit_bias
    yield from params.allowed_token_ids or ()
    yield from params.stop_token_ids


def group(requests: Sequence[Request]) -> list[Request]:
    """Let requests with one prompt share its prefill: the first of each prompt, with the others as its siblings."""
    first: dict[tuple[float | None, tuple[int, ...]], Request] = {}
    for request in requests:
        scored_at = request.params.prompt_temperature if request.params.prompt_logprobs else None
        key = scored_at, tuple(request.prompt)
        if first.setdefault(key, request) is not request:
            first[key].siblings.append(request)
    return list(first.values())


def _top_logprobs(request: Request) -> TopLogprobs:
    if not request.top:
        count = request.params.top_logprobs
        return TopLogprobs(torch.empty(0, count, dtype=torch.int32), torch.empty(0, count))
    ids, logprobs = zip(*request.top, strict=True)
    return TopLogprobs(torch.stack(ids), torch.stack(logprobs))


def _prompt_logprobs(request: Request) -> Tensor:
    return torch.cat(request.prompt_logprobs) if request.prompt_logprobs else torch.empty(0)


def _routed_experts(request: Request, count: int) -> Tensor | None:
    """-1 for tokens that were never computed, or were given up before the request was aborted."""
    routed = request.routed
    if routed is None or routed.shape[1] == 0:
        return None
    return torch.cat([routed[:count], routed.new_full((max(0, count - len(routed)), *routed.shape[1:]), -1)])
