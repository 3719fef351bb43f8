"""x W^T with NVFP4 weights for more tokens than the small matrix instruction is good for: widened in registers too.

The same bits as `nvfp4_gemm._few_tokens`: the slices of K that are warps there follow each other here, each summed from
zero, and their sums are added in the same order. Activations lie in word order (`nvfp4_words.py`).
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl

from .nvfp4_store import load_scales, store_scaled
from .nvfp4_widen import DEPTH, HALF, SCALES
from .nvfp4_words import WORDS, word_step


@triton.jit(do_not_specialize=["M", "steps"])
def middle_tokens(
    x_ptr,
    w_ptr,
    scale_ptr,
    row_scale_ptr,
    token_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    first_row,
    end_row,
    steps,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """x BF16 [M, 128 steps] in word order, w int32 [steps, N, 16] -> columns first_row to end_row of BF16 [M, N]."""
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    rows, tokens = row[:, None], token[None, :]
    row_scale, token_scale, bias = load_scales(
        row_scale_ptr, token_scale_ptr, bias_ptr, rows, tokens, M, end_row, SCALED, BIAS
    )
    source, x_row = tl.where(row < end_row, row, first_row), tl.where(token < M, token, 0)
    w_ptr += source[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scale_ptr += source[:, None] + tl.arange(0, SCALES)[None, :] * 0  # a word of four scales, for each of them
    x_ptr += x_row.to(tl.int64)[None, :] * (steps * DEPTH) + tl.arange(0, HALF)[:, None]
    part = steps // SLICES
    total, piece = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    left = part
    for step in tl.range(0, steps, num_stages=STAGES):
        x0, x1 = tl.load(x_ptr + step * DEPTH), tl.load(x_ptr + step * DEPTH + HALF)
        w = tl.load(w_ptr)
        scales0, scales1 = tl.load(scale_ptr), tl.load(scale_ptr + N)
        w_ptr += N * WORDS
        scale_ptr += 2 * N
        if SLICES == 1:
            total = word_step(w, scales0, scales1, x0, x1, total, ASSEMBLY)
        else:
            piece = word_step(w, scales0, scales1, x0, x1, piece, ASSEMBLY)
            left -= 1
            if left == 0:
                total += piece
                piece = tl.zeros((ROWS, TOKENS), tl.float32)
                left = part
    store_scaled(total, row_scale, token_scale, bias, out_ptr, rows, tokens, M, N, end_row, SCALED, BIAS)
