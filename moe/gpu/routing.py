"""Softmax routing in one launch: what `moe.route` computes, a program a token."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant.gpu.device import on_own_device


@triton.jit
def _sort_keys(x, col):
    """int64 keys that order as float32 x do, the lower column first among equals; a NaN is larger or smaller than all.

    Without its sign bit a float orders as its bits do. Adding zero makes -0 +0.
    """
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - col).to(tl.int64)


@triton.jit
def _short_keys(x, col):
    """The same as int32 of numbers that BF16 holds: a warp finds the largest of them in one instruction."""
    bits = (x + 0.0).to(tl.int32, bitcast=True) >> 16
    bits = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    return (bits << 16) | (0x7FFF - col)


@triton.jit
def _key_column(key, SHORT: tl.constexpr):
    return (0x7FFF - (key & 0x7FFF)) if SHORT else (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _key_value(key, SHORT: tl.constexpr):
    """The number that a key was made from."""
    if SHORT:
        bits = key >> 16
        bits = tl.where(bits < 0, bits ^ 0x7FFF, bits) << 16
    else:
        bits = (key >> 32).to(tl.int32)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _softmax_kernel(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    num_experts,
    scaling,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHORT: tl.constexpr,
):
    """SHORT: logits are BF16, fewer than 2**15 of them."""
    token, col, choice = tl.program_id(0).to(tl.int64), tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    exists = col < num_experts
    x = tl.load(logits_ptr + token * num_experts + col, mask=exists, other=float("-inf")).to(tl.float32)
    largest = tl.max(x, axis=0)
    total = tl.sum(tl.exp(x - largest), axis=0)
    NEVER: tl.constexpr = -(1 << 31) if SHORT else -(1 << 63)
    keys = tl.where(exists, _short_keys(x, col) if SHORT else _sort_keys(x, col), NEVER)
    best = tl.zeros((CHOICES,), keys.dtype)
    for i in tl.static_range(TOP_K):
        key = tl.max(keys, axis=0)
        best = tl.where(choice == i, key, best)
        keys = tl.where(keys == key, NEVER, keys)
    powers = tl.where(choice < TOP_K, tl.exp(_key_value(best, SHORT) - largest), 0.0)
    weights = tl.div_rn(powers, powers * 0 + total)
    if RENORMALIZE:
        weights = tl.div_rn(weights, weights * 0 + tl.sum(weights, axis=0))
    tl.store(ids_ptr + token * TOP_K + choice, _key_column(best, SHORT).to(tl.int64), mask=choice < TOP_K)
    tl.store(weights_ptr + token * TOP_K + choice, weights * scaling, mask=choice < TOP_K)


@on_own_device
def route_softmax(logits: Tensor, top_k: int, renormalize: bool, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Router logits [num_tokens, num_experts] -> expert ids int64 and weights float32, both [num_tokens, top_k].

    float32 softmax over all experts, the best `top_k` in falling order, divided by their sum if `renormalize`, times
    `scaling`. Experts are compared by their logits; of equal ones the lower id is first. Ids are distinct experts
    whatever the logits, NaN too.
    """
    num_tokens, num_experts = logits.shape
    assert 1 <= top_k <= num_experts
    ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(num_tokens, top_k, device=logits.device)
    if num_tokens:
        _softmax_kernel[(num_tokens,)](
            logits.contiguous(),
            ids,
            weights,
            num_experts,
            scaling,
            TOP_K=top_k,
            CHOICES=_power_of_two(top_k),
            EXPERTS=_power_of_two(num_experts),
            RENORMALIZE=renormalize,
            SHORT=logits.dtype == torch.bfloat16 and num_experts < 1 << 15,
            num_warps=1 if num_experts <= 256 else 4,
        )
    return ids, weights


def _power_of_two(count: int) -> int:
    """The next one."""
    return 1 << (count - 1).bit_length()
