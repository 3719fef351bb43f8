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
from ...quant.gpu.early import await_inputs, early

CHUNK = 1024  # pairs, or places, of a program
MOST_PAIRS = 4096  # of one program that does it all: a decoding step has few, and a launch takes longer than they do


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
    places_ptr,
    used_ptr,
    num_pairs,
    num_experts,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Writes a chunk of the pairs to their places; the first program also says which expert owns which block.

    `places_ptr` gets every pair's place, `used_ptr` the number of blocks that an expert owns.
    """
    expert = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + expert, mask=expert < num_experts, other=0)
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    exists = pair < num_pairs
    own = tl.load(ids_ptr + pair, mask=exists, other=0).to(tl.int32)
    rank = tl.load(rank_ptr + pair, mask=exists, other=0)
    blocks, first_block, place = _place(pairs_ptr, counts, pair, exists, own, rank, BLOCK)
    tl.store(places_ptr + pair, place, mask=exists)
    if tl.program_id(0) == 0:
        _own_blocks(experts_ptr, expert, blocks, first_block)
        tl.store(used_ptr, tl.sum(blocks, axis=0))


@triton.jit
def _place(pairs_ptr, counts, pair, exists, own, rank, BLOCK: tl.constexpr):
    """Writes pairs to their places; every expert's number of blocks, its first one, and the places."""
    blocks = (counts + BLOCK - 1) // BLOCK
    first_block = tl.cumsum(blocks, 0) - blocks
    place = tl.gather(first_block, own, 0) * BLOCK + rank
    tl.store(pairs_ptr + place, pair, mask=exists)
    return blocks, first_block, place


@triton.jit
def _own_blocks(experts_ptr, expert, blocks, first_block):
    for i in range(tl.max(blocks, axis=0)):
        tl.store(experts_ptr + first_block + i, expert, mask=i < blocks)


@triton.jit
def _fill(ptr, value, size, CHUNK: tl.constexpr):
    for start in range(0, size, CHUNK):
        at = start + tl.arange(0, CHUNK)
        tl.store(ptr + at, tl.zeros((CHUNK,), tl.int32) + value, mask=at < size)


@triton.jit
def _one_program_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    num_blocks,
    num_experts,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Both kernels, and what fills their outputs before; its threads meet where one needs what others wrote."""
    await_inputs(EARLY)
    expert, pair = tl.arange(0, EXPERTS), tl.arange(0, PAIRS)
    exists = pair < num_pairs
    own = tl.load(ids_ptr + pair, mask=exists, other=0).to(tl.int32)
    _fill(counts_ptr, 0, num_experts, CHUNK)
    _fill(pairs_ptr, num_pairs, num_blocks * BLOCK, CHUNK)
    _fill(experts_ptr, -1, num_blocks, CHUNK)
    tl.debug_barrier()
    rank = tl.atomic_add(counts_ptr + own, 1, mask=exists, sem="relaxed")
    tl.debug_barrier()
    counts = tl.load(counts_ptr + expert, mask=expert < num_experts, other=0, cache_modifier=".cg")
    blocks, first_block, _ = _place(pairs_ptr, counts, pair, exists, own, rank, BLOCK)
    _own_blocks(experts_ptr, expert, blocks, first_block)


@on_own_device
def make_blocks(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
    """ids int [tokens, top_k] -> pairs int32 [blocks * block] (what pads is tokens * top_k), experts int32 [blocks].

    There are as many blocks as there can be at the most; the expert of those that are not needed is -1.
    """
    num_pairs = ids.numel()
    num_blocks = count_blocks(num_pairs, num_experts, block)
    if num_pairs > MOST_PAIRS:
        return make_placed_blocks(ids, num_experts, block)[:2]
    counts, pairs, experts = (
        torch.empty(size, dtype=torch.int32, device=ids.device)
        for size in (num_experts, num_blocks * block, num_blocks)
    )
    size = max(128, _power_of_two(num_pairs))  # no thread without a pair: an atomic's result need not be passed on
    if num_pairs:
        _one_program_kernel[(1,)](
            ids, counts, pairs, experts, num_pairs, num_blocks, num_experts,
            BLOCK=block, EXPERTS=_power_of_two(num_experts), PAIRS=size, CHUNK=CHUNK,
            num_warps=min(16, size // 32), **early(ids),
        )  # fmt: skip
    return pairs, experts


def count_blocks(num_pairs: int, num_experts: int, block: int) -> int:
    """How many there can be at the most."""
    return num_pairs // block + min(num_experts, num_pairs)


@on_own_device
def make_placed_blocks(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `make_blocks` gives, every pair's place among the blocks' int32 [tokens * top_k], and how many blocks are
    needed, int32 [1]; those come first. For many pairs: in two launches, a program for every `CHUNK` of them.
    """
    num_pairs, device = ids.numel(), ids.device
    num_blocks = count_blocks(num_pairs, num_experts, block)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
    rank, places = (torch.empty(num_pairs, dtype=torch.int32, device=device) for _ in range(2))
    pairs = torch.full((num_blocks * block,), num_pairs, dtype=torch.int32, device=device)
    experts = torch.full((num_blocks,), -1, dtype=torch.int32, device=device)
    used = torch.empty(1, dtype=torch.int32, device=device)
    grid = (-(-num_pairs // CHUNK),)
    _count_kernel[grid](ids, counts, rank, num_pairs, CHUNK=CHUNK)
    _place_kernel[grid](
        ids, counts, rank, pairs, experts, places, used, num_pairs, num_experts,
        BLOCK=block, EXPERTS=_power_of_two(num_experts), CHUNK=CHUNK,
    )  # fmt: skip
    return pairs, experts, places, used


def _power_of_two(count: int) -> int:
    """The next one."""
    return 1 << (count - 1).bit_length()
