"""Which experts a token goes to: the reference routers, and kernels for few tokens and the plain softmax on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant import Matmul, matmul
from ..quant.scheme import has_kernels
from .config import MoeConfig


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None = None, multiply: Matmul = matmul) -> Tensor:
    """x [num_tokens, hidden_size] times weight [num_experts, hidden_size] transposed, plus bias, in x's dtype.

    The kernel for few tokens has the bits of `quant.gpu.bf16_gemm`.
    """
    if has_kernels(x) and bias is None and x.dtype == weight.dtype == torch.bfloat16:
        from .gpu.router import is_few, multiply_router

        if is_few(len(x), len(weight)):
            return multiply_router(x, weight)
    return multiply(x, weight, bias)


def route(logits: Tensor, config: MoeConfig, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Router logits [num_tokens, num_experts] -> expert ids int64 and weights float32, both [num_tokens, top_k].

    softmax: probabilities over all experts, the best `top_k` (Qwen3-MoE; with `renormalize` also Mixtral).
    sigmoid: DeepSeek-V3, arXiv 2412.19437 eq. 12-16: `bias` [num_experts] moves the choice, never the weights.
    """
    if has_kernels(logits) and config.scoring == "softmax" and config.n_group == 1 and bias is None:
        from .gpu.routing import route_softmax

        return route_softmax(logits, config.top_k, config.renormalize, config.routed_scaling_factor)
    logits = logits.float()
    scores = logits.softmax(-1) if config.scoring == "softmax" else sigmoid(logits)
    choice = scores if bias is None else scores + bias.float()
    if config.n_group > 1:
        choice = _keep_best_groups(choice, config)
    ids = choice.topk(config.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if config.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if config.scoring == "sigmoid" else 0.0))
    return ids, weights * config.routed_scaling_factor


def sigmoid(logits: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), float32 in and out, as a softmax over x and 0.

    torch's own takes another function for the last few numbers of a tensor, so that a row's bits would depend on how
    many rows there are; a softmax treats every row alike.
    """
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1).softmax(-1)[..., 0]


def _keep_best_groups(choice: Tensor, config: MoeConfig) -> Tensor:
    """-inf outside the `topk_group` groups whose two best experts score highest together."""
    groups = choice.unflatten(-1, (config.n_group, -1))
    group_scores = groups.topk(2, dim=-1).values.sum(-1)
    best = group_scores.topk(config.topk_group, dim=-1).indices
    keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, best, True)
    return groups.masked_fill(~keep[..., None], float("-inf")).flatten(-2)
