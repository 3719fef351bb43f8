"""Pairs of (token, choice) sorted by expert, in blocks that hold one expert's pairs each; no wait for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def make_blocks(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
    """ids int [tokens, top_k] -> pairs int32 [blocks * block] (what pads is tokens * top_k), experts int32 [blocks].

    There are as many blocks as there can be at the most; the expert of those that are not needed is -1.
    """
    flat = ids.flatten().long()
    num_pairs, device = flat.numel(), ids.device
    num_blocks = num_pairs // block + min(num_experts, num_pairs)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, flat, torch.ones_like(flat))
    ends = ((counts + block - 1) // block).cumsum(0)  # in blocks
    order = flat.argsort(stable=True)
    expert = flat[order]
    first_place = (ends - (counts + block - 1) // block) * block
    first_pair = counts.cumsum(0) - counts
    place = first_place[expert] + torch.arange(num_pairs, device=device) - first_pair[expert]
    pairs = torch.full((num_blocks * block,), num_pairs, dtype=torch.int32, device=device)
    pairs[place] = order.int()
    owner = torch.searchsorted(ends, torch.arange(num_blocks, device=device), right=True)
    return pairs, torch.where(owner < num_experts, owner, -1).int()
