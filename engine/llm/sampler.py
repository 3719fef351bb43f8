"""Draw the next tokens and say how likely they were."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import SamplingParams


def seeded_uniforms(seed: int, count: int) -> Tensor:
    """float64 [count] in [0, 1): the i-th drives the i-th token of a request, whatever its batch company."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(logits: Tensor, params: SamplingParams, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """logits float32 [batch, vocab], uniforms [batch] -> token ids int64 [batch] and log-probs float32 [batch].

    Log-probs are those of the softmax at the sampling temperature, without top-p or top-k renormalization.
    """
    if params.temperature not in (0.0, 1.0):
        logits = logits / params.temperature
    logprobs = logits.log_softmax(-1)
    ids = logits.argmax(-1) if params.temperature == 0 else _draw(logprobs, params, uniforms)
    return ids, logprobs.gather(-1, ids[:, None]).squeeze(-1)


def _draw(logprobs: Tensor, params: SamplingParams, uniforms: Tensor) -> Tensor:
    """Inverse-CDF sampling from the allowed tokens."""
    probs = logprobs.exp()
    order = None
    if params.top_p < 1 or params.top_k:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        if params.top_k:
            probs[:, params.top_k :] = 0
        if params.top_p < 1:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= params.top_p * probs.sum(-1, keepdim=True), 0)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    below_total = total.nextafter(torch.zeros_like(total))  # rounding must not reach a token that is not allowed
    target = torch.minimum((uniforms[:, None] * total).to(cdf.dtype), below_total)
    drawn = torch.searchsorted(cdf, target, right=True)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)
