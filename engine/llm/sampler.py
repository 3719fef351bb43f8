"""Draw the next tokens and say how likely they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from msgspec import Struct
from torch import Tensor

from ..config import SamplingParams

BLOCK = 256  # tokens whose probabilities are summed before the first search


class Sampled(Protocol):
    """What the sampler reads of a request."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def new_tokens(self) -> Sequence[int]: ...
    def uniform(self) -> float: ...


class Draw(Struct, frozen=True):
    """One token. `top`: ids and log-probs of the likeliest; `mask`: ids that could be drawn, None for all."""

    token: int
    logprob: float
    top: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None


def seeded_uniforms(seed: int, count: int) -> Tensor:
    """float64 [count] in [0, 1): the i-th drives the i-th token of a request, whatever its batch company."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(logits: Tensor, requests: Sequence[Sampled]) -> list[Draw]:
    """Logits float32 [batch, vocab] -> a token for each request.

    Order of processing: allowed tokens and bias, penalties, temperature, top-k, top-p, min-p. Log-probs by mode:
    "raw" log_softmax(logits), "temperature" log_softmax(logits / temperature), "processed" after everything.
    """
    if any(_is_processed(request.params) for request in requests):
        return _sample_processed(logits, requests)
    scaled = _scale(logits, requests)
    ids, logprobs = draw(scaled, requests)
    reported = [_reported(logits, scaled, scaled, request.params) for request in requests]
    return _make_draws(ids, logprobs, reported, requests, [None] * len(requests))


def _sample_processed(logits: Tensor, requests: Sequence[Sampled]) -> list[Draw]:
    """The same where some requests change or truncate the distribution."""
    edited = logits.clone()
    for row, request in enumerate(requests):
        edit_logits(edited[row], request)
    processed = truncate(_scale(edited, requests), [request.params for request in requests])
    ids, logprobs = draw(processed, requests)
    scaled = _scale(logits, requests)
    reported = [_reported(logits, scaled, processed, request.params) for request in requests]
    masks = [
        processed[row].isfinite().nonzero()[:, 0].int().cpu() if request.params.sampling_mask else None
        for row, request in enumerate(requests)
    ]
    vocab = logits.shape[-1]
    masks = [None if mask is None or len(mask) == vocab else mask for mask in masks]
    for row, request in enumerate(requests):
        if reported[row] is not processed and _is_processed(request.params):
            logprobs[row] = reported[row][row, ids[row]] - reported[row][row].logsumexp(-1)
    return _make_draws(ids, logprobs, reported, requests, masks)


def _reported(raw: Tensor, scaled: Tensor, processed: Tensor, params: SamplingParams) -> Tensor:
    """The logits whose softmax the log-probs speak of."""
    match params.logprobs:
        case "raw":
            return raw
        case "processed":
            return processed
        case _:
            return scaled


def _make_draws(
    ids: Tensor,
    logprobs: Tensor,
    reported: Sequence[Tensor],
    requests: Sequence[Sampled],
    masks: Sequence[Tensor | None],
) -> list[Draw]:
    rows = zip(ids.tolist(), logprobs.tolist(), masks, strict=True)
    return [
        Draw(token, logprob, _top(reported[row][row], requests[row].params.top_logprobs), mask)
        for row, (token, logprob, mask) in enumerate(rows)
    ]


def _top(logits: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    if not count:
        return None
    values, ids = logits.log_softmax(-1).topk(count)
    return ids.int().cpu(), values.cpu()


def _is_processed(params: SamplingParams) -> bool:
    """Whether more than the temperature shapes the distribution, or another one is reported."""
    return (
        params.changes_logits
        or params.top_p < 1
        or params.top_k > 0
        or params.min_p > 0
        or (params.logprobs == "raw" and params.temperature not in (0.0, 1.0))
    )


def _scale(logits: Tensor, requests: Sequence[Sampled]) -> Tensor:
    """logits / temperature; greedy rows at temperature 1."""
    temperatures = [request.params.temperature or 1.0 for request in requests]
    if all(temperature == 1 for temperature in temperatures):
        return logits
    return logits / torch.tensor(temperatures, device=logits.device)[:, None]


def edit_logits(logits: Tensor, request: Sampled) -> None:
    """Bias, allowed tokens and penalties, in place on one row [vocab].

    Repetition: arXiv 1909.05858 section 4.1, over prompt and completion; frequency and presence: OpenAI's API
    reference, over the completion.
    """
    params = request.params
    if params.allowed_token_ids is not None:
        banned = torch.ones_like(logits, dtype=torch.bool)
        banned[torch.tensor(params.allowed_token_ids, device=logits.device)] = False
        logits.masked_fill_(banned, float("-inf"))
    if params.logit_bias:
        at = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[at] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if params.repetition_penalty != 1:
        seen = torch.tensor([*request.prompt, *request.new_tokens], device=logits.device).unique()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.frequency_penalty or params.presence_penalty) and request.new_tokens:
        drawn = torch.tensor(request.new_tokens, device=logits.device)
        counts = drawn.bincount(minlength=len(logits))
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """-inf outside top-k, then top-p (of what is left, renormalized), then min-p; [batch, vocab]."""
    if all(p.top_p == 1 and p.top_k == 0 and p.min_p == 0 for p in params):
        return logits
    vocab, device = logits.shape[-1], logits.device
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([p.top_k or vocab for p in params], device=device)[:, None]
    ordered = ordered.masked_fill(torch.arange(vocab, device=device) >= top_k, float("-inf"))
    probs = ordered.softmax(-1)
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    outside = (probs.cumsum(-1) - probs >= top_p) & (top_p < 1) | (probs < min_p * probs[:, :1])
    ordered = ordered.masked_fill(outside, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def draw(logits: Tensor, requests: Sequence[Sampled]) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling from softmax(logits): ids int64 [batch], log-probs float32 [batch]; argmax where greedy.

    A first search over the sums of blocks and a second one within a block: no cumulative sum over a vocabulary.
    """
    peak, best = logits.max(-1, keepdim=True)
    probs = (logits - peak).exp_()
    vocab = logits.shape[-1]
    blocks = probs.unflatten(-1, (-1, BLOCK if vocab % BLOCK == 0 else vocab))
    sums = blocks.sum(-1).double()  # [batch, num_blocks]
    total = sums.sum(-1)
    uniforms = torch.tensor([request.uniform() for request in requests], dtype=torch.float64, device=logits.device)
    block, rest = _search(sums, uniforms * total)
    inner = blocks[torch.arange(len(block), device=block.device), block].double()
    within, _ = _search(inner, rest / sums.gather(-1, block[:, None])[:, 0] * inner.sum(-1))
    greedy = torch.tensor([request.params.temperature == 0 for request in requests], device=logits.device)
    ids = torch.where(greedy, best[:, 0], block * blocks.shape[-1] + within)
    logprobs = (logits.gather(-1, ids[:, None]) - peak)[:, 0].double() - total.log()
    return ids, logprobs.float()


def _search(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where `target` [batch] falls in the cumulative sum of weights [batch, n], and by how much it goes beyond."""
    cdf = weights.cumsum(-1)
    last = cdf[:, -1]
    below = torch.minimum(target, last.nextafter(torch.zeros_like(last)))  # rounding must not reach a zero weight
    at = torch.searchsorted(cdf, below[:, None], right=True)
    before = cdf.gather(-1, at) - weights.gather(-1, at)
    return at[:, 0], (below[:, None] - before)[:, 0].clamp_(min=0)
