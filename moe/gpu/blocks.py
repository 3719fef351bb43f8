"""Pairs of (token, choice) sorted by expert, in blocks that hold one expert's pairs each; no wait for the GPU.

Which place a pair takes among its expert's may differ from run to run: a pair's result does not depend on it.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant.gpu.device import on_own_device

CHUNK = 1024  # pairs, or places, of a program


@triton.jit
def _count_kernel(ids_ptr, counts_ptr, rank_ptr, num_pairs, CHUNK: tl.constexpr):
    """Counts every expert's pairs; a pair's rank among them is what it found."""
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    exists = pair < num_pairs
    expert = tl.load(ids_ptr + pair, mask=exists, other=0)
    tl.store(rank_ptr + pair, tl.atomic_add(counts_ptr + expert, 1, mask=exists), mask=exists)


@triton.jit
def _place_kernel(
    ids_ptr,
    counts_ptr,
    rank_ptr,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    num_blocks,
    num_experts,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Writes a chunk of the pairs to their places; the first program also says which expert owns which block."""
    expert = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + expert, mask=expert < num_experts, other=0)
    blocks = (counts + BLOCK - 1) // BLOCK
    first_block = tl.cumsum(blocks, 0) - blocks
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    exists = pair < num_pairs
    own = tl.load(ids_ptr + pair, mask=exists, other=0).to(tl.int32)
    start = tl.gather(first_block, own, 0) * BLOCK
    tl.store(pairs_ptr + start + tl.load(rank_ptr + pair, mask=exists, other=0), pair, mask=exists)
    if tl.program_id(0) == 0:
        most = tl.max(blocks, axis=0)
        for i in range(most):
            tl.store(experts_ptr + first_block + i, expert, mask=i < blocks)


@on_own_device
def make_blocks(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
    """ids int [tokens, top_k] -> pairs int32 [blocks * block] (what pads is tokens * top_k), experts int32 [blocks].

    There are as many blocks as there can be at the most; the expert of those that are not needed is -1.
    """
    num_pairs, device = ids.numel(), ids.device
    num_blocks = num_pairs // block + min(num_experts, num_pairs)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
    rank = torch.empty(num_pairs, dtype=torch.int32, device=device)
    pairs = torch.full((num_blocks * block,), num_pairs, dtype=torch.int32, device=device)
    experts = torch.full((num_blocks,), -1, dtype=torch.int32, device=device)
    grid, experts_power = (-(-num_pairs // CHUNK),), 1 << (num_experts - 1).bit_length()
    _count_kernel[grid](ids, counts, rank, num_pairs, CHUNK=CHUNK)
    _place_kernel[grid](
        ids, counts, rank, pairs, experts, num_pairs, num_blocks, num_experts,
        BLOCK=block, EXPERTS=experts_power, CHUNK=CHUNK,
    )  # fmt: skip
    return pairs, experts
