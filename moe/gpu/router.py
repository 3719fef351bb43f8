"""A router's logits for few tokens: a program multiplies some tokens with few experts, so that there are many programs.

K is cut into slices, one a warp, that are added in order: a token's logits depend on no other token.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...quant.gpu.device import on_own_device
from ...quant.gpu.early import await_inputs, early
from ...quant.gpu.slices import sum_in_order

MOST_PROGRAMS = 128  # about one a multiprocessor: with more, a library is as fast. benchmarks/NOTES.md
TILE = {"SLICES": 4, "TOKENS": 16, "EXPERTS": 8, "DEPTH": 128, "STAGES": 4}


@triton.jit(do_not_specialize=["M", "steps"])
def logits_kernel(
    x_ptr,
    w_ptr,
    logits_ptr,
    M,
    num_experts,
    K,
    steps,
    SLICES: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """BF16 x [M, K], w [num_experts, K] -> BF16 [M, num_experts]; a slice is `steps` times DEPTH columns."""
    await_inputs(EARLY)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    start = tl.arange(0, SLICES)[:, None] * (steps * DEPTH) + tl.arange(0, DEPTH)[None, :]
    inside = (token < M)[None, :, None]  # others read nothing: one line that all programs ask for is slow to come
    x_ptr += token.to(tl.int64)[None, :, None] * K + start[:, None, :]
    w_ptr += tl.where(expert < num_experts, expert, 0)[None, None, :] * K + start[:, :, None]
    total = tl.zeros((SLICES, TOKENS, EXPERTS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        at = step * DEPTH
        if RAGGED:
            left = start < K - at
            x = tl.load(x_ptr + at, mask=inside & left[:, None, :], other=0.0)
            w = tl.load(w_ptr + at, mask=left[:, :, None], other=0.0)
        else:
            x, w = tl.load(x_ptr + at, mask=inside, other=0.0), tl.load(w_ptr + at)
        total = tl.dot(x, w, total)
    exists = (token < M)[:, None] & (expert < num_experts)[None, :]
    target = logits_ptr + token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    tl.store(target, sum_in_order(total).to(tl.bfloat16), mask=exists)


def grid(num_tokens: int, num_experts: int) -> tuple[int, int]:
    """Programs along experts and along tokens."""
    return -(-num_experts // TILE["EXPERTS"]), -(-num_tokens // TILE["TOKENS"])


def is_few(num_tokens: int, num_experts: int) -> bool:
    """Whether `multiply_router` is faster than a library."""
    experts, tokens = grid(num_tokens, num_experts)
    return experts * tokens <= MOST_PROGRAMS


@on_own_device
def multiply_router(x: Tensor, weight: Tensor) -> Tensor:
    """BF16 x [num_tokens, K], weight [num_experts, K] -> x W^T, BF16 [num_tokens, num_experts], sums in float32."""
    (M, K), num_experts = x.shape, len(weight)
    logits = x.new_empty(M, num_experts)
    slice_step = TILE["SLICES"] * TILE["DEPTH"]
    if M:
        logits_kernel[grid(M, num_experts)](
            x.contiguous(), weight, logits, M, num_experts, K, -(-K // slice_step),
            **TILE, RAGGED=K % slice_step != 0, num_warps=TILE["SLICES"], **early(x),
        )  # fmt: skip
    return logits
