"""Experts' matrix products: a program computes some rows of one expert's weight for a block of that expert's tokens.

The weight's rows are the tall side of the tile and the tokens its short one, so that a few tokens still fill the matrix
units, and every weight is read once. Sums run over K in one order: a token's result depends on no other token. BF16 and
FP8 here, NVFP4 in `nvfp4_grouped.py`.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl

from ...quant.gpu.early import await_inputs


@triton.jit
def find_block(sorted_ptr, expert_ptr, num_pairs, TOKENS: tl.constexpr, SORTED: tl.constexpr, EARLY: tl.constexpr):
    """A program's expert, -1 if it has none; the (token, choice) pairs of its block, and which of them exist.

    Not SORTED: every pair is a block of its own, and expert_ptr are the pairs' experts.
    """
    await_inputs(EARLY)
    block = tl.program_id(1)
    expert = tl.load(expert_ptr + block).to(tl.int64)
    place = tl.arange(0, TOKENS)
    if SORTED:
        pair = tl.load(sorted_ptr + block * TOKENS + place)
    else:
        pair = tl.where(place == 0, block, num_pairs)
    return expert, pair, pair < num_pairs


@triton.jit(do_not_specialize=["num_pairs"])
def grouped_gate_up(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    row_scale_ptr,
    out_ptr,
    sorted_ptr,
    expert_ptr,
    num_pairs,
    K,
    inner,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    SORTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """silu(gate) * up of every pair: x [tokens, K], w [experts, 2 inner, K] -> BF16 [pairs, inner].

    SCALED: both are FP8, every token and every row has a scale; else both are BF16.
    """
    expert, pair, exists = find_block(sorted_ptr, expert_ptr, num_pairs, TOKENS, SORTED, EARLY)
    if expert < 0:
        return
    token = tl.where(exists, pair // TOP_K, 0)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    gate_ptr = w_ptr + (expert * 2 * inner + row[:, None]) * K + k[None, :]
    up_ptr = gate_ptr + inner.to(tl.int64) * K
    x_ptr = x_ptr + token.to(tl.int64)[None, :] * K + k[:, None]
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        x = tl.load(x_ptr + step)
        gate = tl.dot(tl.load(gate_ptr + step), x, gate)
        up = tl.dot(tl.load(up_ptr + step), x, up)
    if SCALED:
        x_scale = tl.load(x_scale_ptr + token)[None, :]
        row_scale_ptr = row_scale_ptr + expert * 2 * inner + row
        gate = gate * tl.load(row_scale_ptr)[:, None] * x_scale
        up = up * tl.load(row_scale_ptr + inner)[:, None] * x_scale
    store_gated(out_ptr, gate, up, pair, row, exists, inner)


@triton.jit
def gated(gate, up):
    """silu(gate) * up as BF16; BF16 of gate and up first, as two linears would leave them."""
    gate = gate.to(tl.bfloat16).to(tl.float32)
    up = up.to(tl.bfloat16).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(0.0 - gate))).to(tl.bfloat16).to(tl.float32)
    return (activated * up).to(tl.bfloat16)


@triton.jit
def store_gated(out_ptr, gate, up, pair, row, exists, inner):
    target = out_ptr + pair.to(tl.int64)[None, :] * inner + row[:, None]
    tl.store(target, gated(gate, up), mask=exists[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def grouped_down(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    row_scale_ptr,
    out_ptr,
    sorted_ptr,
    expert_ptr,
    num_pairs,
    K,
    N,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    SORTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x [pairs, K], w [experts, N, K] -> BF16 [pairs, N]; SCALED as above."""
    expert, pair, exists = find_block(sorted_ptr, expert_ptr, num_pairs, TOKENS, SORTED, EARLY)
    if expert < 0:
        return
    source = tl.where(exists, pair, 0).to(tl.int64)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    w_ptr = w_ptr + (expert * N + row[:, None]) * K + k[None, :]
    x_ptr = x_ptr + source[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        total = tl.dot(tl.load(w_ptr + step), tl.load(x_ptr + step), total)
    if SCALED:
        x_scale = tl.load(x_scale_ptr + source)[None, :]
        total = total * tl.load(row_scale_ptr + expert * N + row)[:, None] * x_scale
    tl.store(out_ptr + pair.to(tl.int64)[None, :] * N + row[:, None], total.to(tl.bfloat16), mask=exists[None, :])
