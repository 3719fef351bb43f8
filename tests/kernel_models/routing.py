"""Routing inside the fused MoE: logits -> (expert ids, BF16 weights), as `Routing::Runner::run` composes it.

trtllm_fused_moe_routing_runner.cu, RoutingCustomPolicy.cuh and trtllm_fused_moe_routing_deepseek.cu: scores in float32,
ties to the lower expert, weights always BF16 at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TOP_K = {"grouped": 22, "other": 32}
MAX_TOPK_GROUP = 4
MAX_EXPERTS_PER_GROUP = 32


def top_k_of(keys: Tensor, top_k: int) -> Tensor:
    """[T, E] -> [T, top_k] int64, largest first, ties to the lower index."""
    return keys.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def pick_grouped(keys: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """Experts of the `topk_group` groups whose two best keys sum highest."""
    tokens, experts = keys.shape
    if experts % n_group or experts // n_group > MAX_EXPERTS_PER_GROUP or topk_group > MAX_TOPK_GROUP:
        raise ValueError(f"grouped routing: {experts} experts, {n_group} groups, topk_group {topk_group}")
    groups = keys.view(tokens, n_group, -1)
    group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
    chosen = torch.zeros(tokens, n_group, dtype=torch.bool)
    chosen.scatter_(1, top_k_of(group_scores, topk_group), True)
    return top_k_of(torch.where(chosen[..., None], groups, float("-inf")).flatten(1), top_k)


def route(
    logits: Tensor,
    bias: Tensor | None,
    method: str,
    top_k: int,
    n_group: int,
    topk_group: int,
    scaling: float,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """[T, E] -> (ids int64 [T, top_k], weights bfloat16 [T, top_k]); `method` is the RoutingMethodType's name."""
    scores = logits.float()
    if method in ("DeepSeekV3", "MiniMax2"):
        sigmoid = torch.sigmoid(scores)
        grouped = method == "DeepSeekV3" and n_group > 1
        offset = torch.zeros(()) if bias is None else bias.float()
        if grouped:  # the grouped kernel holds the bias in its output type
            ids = pick_grouped(sigmoid + offset.bfloat16().float(), top_k, n_group, topk_group)
        else:
            ids = top_k_of(sigmoid + offset, top_k)
        weights = sigmoid.gather(1, ids)
        epsilon, factor = (1e-20, 1.0) if method == "MiniMax2" else (0.0, scaling)
        weights = weights * factor / (weights.sum(dim=-1, keepdim=True) + epsilon)
    elif method == "Default":
        softmax = torch.softmax(scores, dim=-1)
        ids = top_k_of(softmax, top_k)
        weights = softmax.gather(1, ids)
    elif method in ("Renormalize", "RenormalizeNaive"):  # one implementation there
        ids = top_k_of(scores, top_k)
        weights = torch.softmax(scores.gather(1, ids), dim=-1)
    elif method in ("SigmoidRenorm", "Sigmoid"):
        sigmoid = torch.sigmoid(scores)
        ids = top_k_of(sigmoid, top_k)
        weights = sigmoid.gather(1, ids)
        if method == "SigmoidRenorm" and normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    elif method == "TopK":
        ids = top_k_of(scores, top_k)
        weights = scores.gather(1, ids)
    elif method == "TopKSigmoid":
        ids = top_k_of(scores, top_k)
        weights = torch.sigmoid(scores.gather(1, ids))
    else:
        raise NotImplementedError(f"the model has no routing method {method}")
    return ids, weights.bfloat16()


def unpack_ids(packed: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [T, top_k], (id << 16) | BF16 bits -> (ids int64, weights bfloat16): `PackedScoreIdx`, little endian."""
    ids = (packed >> 16).long()
    bits = (packed & 0xFFFF).to(torch.int32)
    signed = torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16)
    return ids, signed.view(torch.bfloat16)
