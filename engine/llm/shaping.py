"""What makes the distribution that is drawn from: temperature, bias, allowed tokens, penalties, truncation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..config import SamplingParams
from .likelihoods import Likelihoods
from .transfers import upload

WIDTHS = (64, 512, 4096)  # likeliest tokens looked at before a whole vocabulary is sorted


class Shaped(Protocol):
    """What shapes a request's logits."""

    @property
    def params(self) -> SamplingParams: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def new_tokens(self) -> Sequence[int]: ...


def scale(logits: Tensor, requests: Sequence[Shaped]) -> Tensor:
    """logits / temperature; greedy rows at temperature 1."""
    temperatures = [request.params.temperature or 1.0 for request in requests]
    if all(temperature == 1 for temperature in temperatures):
        return logits
    return logits / upload(temperatures, logits.device, torch.float32)[:, None]


def shape(logits: Tensor, scaled: Tensor, requests: Sequence[Shaped]) -> Tensor:
    """Everything in order, [batch, vocab]: allowed tokens, bias, penalties, temperature, top-k, top-p, min-p.

    `scaled`: what `scale` makes of the logits, taken where nothing but truncation acts.
    """
    if any(request.params.changes_logits for request in requests):
        edited = logits.clone()
        for row, request in enumerate(requests):
            edit_logits(edited[row], request)
        scaled = scale(edited, requests)
    return truncate(scaled, [request.params for request in requests])


def edit_logits(logits: Tensor, request: Shaped) -> None:
    """Bias, allowed tokens and penalties, in place on one row [vocab].

    Repetition: arXiv 1909.05858 section 4.1, over prompt and completion; frequency and presence: OpenAI's API
    reference, over the completion.
    """
    params = request.params
    if params.allowed_token_ids is not None:
        banned = torch.ones_like(logits, dtype=torch.bool)
        banned[torch.tensor(list(params.allowed_token_ids), device=logits.device)] = False
        logits.masked_fill_(banned, float("-inf"))
    if params.logit_bias:
        at = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[at] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if params.repetition_penalty != 1:
        seen = torch.tensor([*request.prompt, *request.new_tokens], device=logits.device).unique()
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.frequency_penalty or params.presence_penalty) and request.new_tokens:
        drawn, counts = torch.tensor(request.new_tokens, device=logits.device).unique(return_counts=True)
        logits[drawn] -= params.frequency_penalty * counts + params.presence_penalty


def truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """-inf outside top-k, then top-p (of what is left, renormalized), then min-p; [batch, vocab].

    Each keeps a beginning of the tokens in the order of their logits, the lower id first among equal logits; so what
    all three keep is a number of tokens, and the last one's logit is a threshold.
    """
    rows = [row for row, one in enumerate(params) if one.truncates]
    if not rows:
        return logits
    if len(rows) == len(params):
        return _keep(logits, *_find_thresholds(logits, params))
    out = logits.clone()
    out[rows] = truncate(logits[rows], [params[row] for row in rows])
    return out


def _keep(logits: Tensor, counts: Tensor, thresholds: Tensor, tied: Tensor) -> Tensor:
    """-inf outside the likeliest `counts` [batch, 1] tokens, whose last one has the logit `thresholds` [batch, 1].

    `tied` bool [batch, 1]: where tokens beyond may have that logit, too.
    """
    out = logits.masked_fill(logits < thresholds, float("-inf"))
    surplus = tied.nonzero()[:, 0]
    if len(surplus):
        rows, at = logits[surplus], thresholds[surplus]
        equal = rows == at
        room = counts[surplus] - (rows > at).sum(-1, keepdim=True)
        out[surplus] = out[surplus].masked_fill(equal & (equal.cumsum(-1) > room), float("-inf"))
    return out


def _find_thresholds(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor, Tensor]:
    """How many tokens each row keeps, the logit of the last, and whether the next may have the same; [batch, 1]."""
    vocab, device = logits.shape[-1], logits.device
    limits = torch.tensor([[min(p.top_k or vocab, vocab), p.top_p, p.min_p] for p in params], dtype=torch.float64)
    limits = limits.to(device)
    totals = torch.ones(len(params), 1, dtype=torch.float64, device=device)
    nucleus = [row for row, p in enumerate(params) if p.top_p < 1 and not 0 < p.top_k < vocab]
    if nucleus:
        totals[nucleus] = Likelihoods(logits[nucleus]).totals
    counts = torch.zeros(len(params), 1, dtype=torch.long, device=device)
    thresholds = torch.zeros_like(logits[:, :1])
    tied = torch.zeros_like(counts, dtype=torch.bool)
    left = torch.arange(len(params), device=device)
    for width in (*(width for width in WIDTHS if width < vocab), vocab):
        rows = logits if len(left) == len(logits) else logits[left]
        ordered = rows.topk(width).values if width < vocab else rows.sort(dim=-1, descending=True).values
        counts[left] = _count_kept(ordered, limits[left], totals[left], vocab)
        thresholds[left] = ordered.gather(-1, counts[left] - 1)
        following = ordered.gather(-1, counts[left].clamp(max=width - 1))  # itself where there is none
        tied[left] = following == thresholds[left]
        top_k = limits[left, 0]  # its tokens are renormalized among themselves: all of them are needed
        left = left[(top_k > width) & ((top_k < vocab) | (counts[left, 0] == width))]
        if not len(left):
            break
    return counts, thresholds, tied


def _count_kept(ordered: Tensor, limits: Tensor, totals: Tensor, vocab: int) -> Tensor:
    """How many of the likeliest logits `ordered` [batch, width] lie within top-k, top-p and min-p, [batch, 1].

    limits float64 [batch, 3]: top-k, top-p, min-p. totals [batch, 1]: sums of exp(logits - peak) without top-k.
    """
    top_k, top_p, min_p = limits.split(1, dim=-1)
    at = torch.arange(ordered.shape[-1], device=ordered.device)
    weights = (ordered - ordered[:, :1]).exp().double().masked_fill(at >= top_k, 0)
    cdf = weights.cumsum(-1)
    totals = torch.where(top_k < vocab, cdf[:, -1:], totals)
    inside = (at < top_k) & (ordered > float("-inf")) & (weights >= min_p)
    inside &= (cdf - weights < top_p * totals) | (top_p == 1)
    return inside.sum(-1, keepdim=True).clamp_(min=1)
