"""Experts' products with NVFP4 weights, widened in registers as `quant/gpu/nvfp4_widen.py` tells.

Weights lie as `NVFP4Packer` says: step after step of 128 along K, codes [experts, steps, rows, 64], block scales
[experts, steps, 2, rows, 4]. A program takes rows of one expert and a block of that expert's tokens. K may be cut into
equal slices, a warp each, that are summed in order at the end: the same for any number of tokens.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl

from ...quant.gpu.nvfp4_gemm import sum_in_order
from ...quant.gpu.nvfp4_widen import DEPTH, EPILOGUE, HALF, SCALES, first_half, real_order, second_half
from .grouped_gemm import pair_rows, store_gated


@triton.jit
def _weight_pointers(w_ptr, scale_ptr, expert, row, num_rows, steps, start):
    """Of the rows' first step in every slice: codes [SLICES, ROWS, 64], scales of its first half [SLICES, ROWS, 4]."""
    first = expert * steps + start.to(tl.int64)  # [SLICES, 1, 1]
    w_ptr += first * (num_rows * HALF) + row[None, :, None] * HALF + tl.arange(0, HALF)[None, None, :]
    scale_ptr += first * (2 * SCALES * num_rows) + row[None, :, None] * SCALES
    return w_ptr, scale_ptr + tl.arange(0, SCALES)[None, None, :]


@triton.jit
def _product(w, scales0, scales1, x0, x1, total, ASSEMBLY: tl.constexpr):
    """One step of every slice: w u8 [SLICES, ROWS, 64] times x BF16 [SLICES, 64, TOKENS], two halves."""
    total = tl.dot(first_half(w, scales0, ASSEMBLY), x0, total)
    return tl.dot(second_half(w, scales1, ASSEMBLY), x1, total)


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    scale_ptr,
    row_scale_ptr,
    out_ptr,
    sorted_ptr,
    expert_ptr,
    num_pairs,
    K,
    inner,
    TOP_K: tl.constexpr,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """silu(gate) * up of every pair: x BF16 [tokens, K], 2 inner rows of weights -> BF16 [pairs, inner].

    SCALED: x are exact products of codes and block scales, and every token has a scale.
    """
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pair, exists = pair_rows(sorted_ptr, tl.program_id(1), num_pairs, TOKENS)
    token = tl.where(exists, pair // TOP_K, 0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    steps = K // DEPTH
    part = steps // SLICES
    start = tl.arange(0, SLICES)[:, None, None] * part
    gate_ptr, gate_scale_ptr = _weight_pointers(w_ptr, scale_ptr, expert, row, 2 * inner, steps, start)
    up_ptr, up_scale_ptr = gate_ptr + inner * HALF, gate_scale_ptr + inner * SCALES
    x_ptr += token.to(tl.int64)[None, None, :] * K + start * DEPTH + real_order()[None, :, None]
    gate, up = tl.zeros((SLICES, ROWS, TOKENS), tl.float32), tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    for step in tl.range(0, part, num_stages=STAGES):
        x0, x1 = tl.load(x_ptr + step * DEPTH), tl.load(x_ptr + step * DEPTH + HALF)
        at, scale_at = step * (2 * HALF) * inner, step * (4 * SCALES) * inner
        half = 2 * SCALES * inner
        scales0, scales1 = tl.load(gate_scale_ptr + scale_at), tl.load(gate_scale_ptr + scale_at + half)
        gate = _product(tl.load(gate_ptr + at), scales0, scales1, x0, x1, gate, ASSEMBLY)
        scales0, scales1 = tl.load(up_scale_ptr + scale_at), tl.load(up_scale_ptr + scale_at + half)
        up = _product(tl.load(up_ptr + at), scales0, scales1, x0, x1, up, ASSEMBLY)
    row_scale_ptr = row_scale_ptr + expert * 2 * inner + row
    gate = sum_in_order(gate) * (tl.load(row_scale_ptr) * EPILOGUE)[:, None]
    up = sum_in_order(up) * (tl.load(row_scale_ptr + inner) * EPILOGUE)[:, None]
    if SCALED:
        x_scale = tl.load(x_scale_ptr + token)[None, :]
        gate, up = gate * x_scale, up * x_scale
    store_gated(out_ptr, gate, up, pair, row, exists, inner)


@triton.jit(do_not_specialize=["num_pairs"])
def down(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    scale_ptr,
    row_scale_ptr,
    out_ptr,
    sorted_ptr,
    expert_ptr,
    num_pairs,
    K,
    N,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """x BF16 [pairs, K], N rows of weights -> BF16 [pairs, N]; SCALED as above."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pair, exists = pair_rows(sorted_ptr, tl.program_id(1), num_pairs, TOKENS)
    source = tl.where(exists, pair, 0).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    steps = K // DEPTH
    part = steps // SLICES
    start = tl.arange(0, SLICES)[:, None, None] * part
    w_ptr, scale_ptr = _weight_pointers(w_ptr, scale_ptr, expert, row, N, steps, start)
    x_ptr += source[None, None, :] * K + start * DEPTH + real_order()[None, :, None]
    total = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    for step in tl.range(0, part, num_stages=STAGES):
        x0, x1 = tl.load(x_ptr + step * DEPTH), tl.load(x_ptr + step * DEPTH + HALF)
        scale_at = step * (2 * SCALES) * N
        scales0, scales1 = tl.load(scale_ptr + scale_at), tl.load(scale_ptr + scale_at + SCALES * N)
        total = _product(tl.load(w_ptr + step * HALF * N), scales0, scales1, x0, x1, total, ASSEMBLY)
    total = sum_in_order(total) * (tl.load(row_scale_ptr + expert * N + row) * EPILOGUE)[:, None]
    if SCALED:
        total = total * tl.load(x_scale_ptr + source)[None, :]
    tl.store(out_ptr + pair.to(tl.int64)[None, :] * N + row[:, None], total.to(tl.bfloat16), mask=exists[None, :])
