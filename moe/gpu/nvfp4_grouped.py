"""Experts' products with NVFP4 weights for few tokens an expert, widened in registers (`quant/gpu/nvfp4_widen.py`).

Weights lie as `NVFP4Packer` says: step after step of 128 along K, codes [experts, steps, rows, 64], block scales
[experts, steps, 2, rows, 4]. A program of one or two warps takes rows of one expert and a block of that expert's
tokens; sums run over K in one order, whatever the tile.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl

from ...quant.gpu.nvfp4_widen import DEPTH, EPILOGUE, HALF, SCALES, first_half, real_order, second_half
from .grouped_gemm import find_block, store_gated


@triton.jit
def _scale_pointers(scale_ptr, step, num_rows, row, WORDS: tl.constexpr):
    """Of a step's first half, its rows' scales [ROWS, 4], or the words that hold four of them, for each of the four.

    A thread of a small tile has less than the four bytes that a copy to shared memory takes at the least.
    """
    place = step * 2 * num_rows + row[:, None]
    if WORDS:
        return scale_ptr + place + tl.arange(0, SCALES)[None, :] * 0
    return scale_ptr + place * SCALES + tl.arange(0, SCALES)[None, :]


@triton.jit
def _load_scales(scale_ptr, half, WORDS: tl.constexpr):
    """uint8 or int32 [ROWS, 4]; `half` rows further on lie those of the next half."""
    if WORDS:
        return (tl.load(scale_ptr + half) >> (tl.arange(0, SCALES) * 8)[None, :]) & 0xFF
    return tl.load(scale_ptr + half * SCALES)


@triton.jit
def _product(w_ptr, scale_ptr, next_half, x0, x1, total, ASSEMBLY: tl.constexpr, WORDS: tl.constexpr):
    """One step: codes u8 [ROWS, 64] times both halves of x, BF16 [64, TOKENS]; their scales lie `next_half` apart."""
    w = tl.load(w_ptr)
    scales0, scales1 = _load_scales(scale_ptr, 0, WORDS), _load_scales(scale_ptr, next_half, WORDS)
    total = tl.dot(first_half(w[None], scales0[None], ASSEMBLY).reshape(w.shape), x0, total)
    return tl.dot(second_half(w[None], scales1[None], ASSEMBLY).reshape(w.shape), x1, total)


@triton.jit(do_not_specialize=["num_pairs"])
def grouped_gate_up(
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
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    SORTED: tl.constexpr,
    EARLY: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WORDS: tl.constexpr,
):
    """silu(gate) * up of every pair: x BF16 [tokens, K], 2 inner rows of weights -> BF16 [pairs, inner].

    SCALED: x are exact products of codes and block scales, and every token has a scale. WORDS: scales are read as
    int32.
    """
    expert, pair, exists = find_block(sorted_ptr, expert_ptr, num_pairs, TOKENS, SORTED, EARLY)
    if expert < 0:
        return
    token = tl.where(exists, pair // TOP_K, 0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    steps, rows = K // DEPTH, 2 * inner
    w_ptr += (expert * steps * rows + row[:, None]) * HALF + tl.arange(0, HALF)[None, :]
    scale_ptr = _scale_pointers(scale_ptr, expert * steps, rows, row, WORDS)
    SIZE: tl.constexpr = 1 if WORDS else SCALES
    x_ptr += token.to(tl.int64)[None, :] * K + real_order()[:, None]
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        x0 = tl.load(x_ptr + step * DEPTH, mask=exists[None, :], other=0.0)
        x1 = tl.load(x_ptr + step * DEPTH + HALF, mask=exists[None, :], other=0.0)
        at, scales_at = w_ptr + step * HALF * rows, scale_ptr + step * 2 * SIZE * rows
        gate = _product(at, scales_at, rows, x0, x1, gate, ASSEMBLY, WORDS)
        up = _product(at + inner * HALF, scales_at + inner * SIZE, rows, x0, x1, up, ASSEMBLY, WORDS)
    row_scale_ptr = row_scale_ptr + expert * 2 * inner + row
    gate = gate * (tl.load(row_scale_ptr) * EPILOGUE)[:, None]
    up = up * (tl.load(row_scale_ptr + inner) * EPILOGUE)[:, None]
    if SCALED:
        x_scale = tl.load(x_scale_ptr + token)[None, :]
        gate, up = gate * x_scale, up * x_scale
    store_gated(out_ptr, gate, up, pair, row, exists, inner)


@triton.jit(do_not_specialize=["num_pairs"])
def grouped_down(
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
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    SORTED: tl.constexpr,
    EARLY: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WORDS: tl.constexpr,
):
    """x BF16 [pairs, K], N rows of weights -> BF16 [pairs, N]; SCALED and WORDS as above."""
    expert, pair, exists = find_block(sorted_ptr, expert_ptr, num_pairs, TOKENS, SORTED, EARLY)
    if expert < 0:
        return
    source = tl.where(exists, pair, 0).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    steps = K // DEPTH
    w_ptr += (expert * steps * N + row[:, None]) * HALF + tl.arange(0, HALF)[None, :]
    scale_ptr = _scale_pointers(scale_ptr, expert * steps, N, row, WORDS)
    SIZE: tl.constexpr = 1 if WORDS else SCALES
    x_ptr += source[None, :] * K + real_order()[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        x0 = tl.load(x_ptr + step * DEPTH, mask=exists[None, :], other=0.0)
        x1 = tl.load(x_ptr + step * DEPTH + HALF, mask=exists[None, :], other=0.0)
        scales_at = scale_ptr + step * 2 * SIZE * N
        total = _product(w_ptr + step * HALF * N, scales_at, N, x0, x1, total, ASSEMBLY, WORDS)
    total = total * (tl.load(row_scale_ptr + expert * N + row) * EPILOGUE)[:, None]
    if SCALED:
        total = total * tl.load(x_scale_ptr + source)[None, :]
    tl.store(out_ptr + pair.to(tl.int64)[None, :] * N + row[:, None], total.to(tl.bfloat16), mask=exists[None, :])
