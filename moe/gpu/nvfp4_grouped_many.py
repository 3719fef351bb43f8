"""The products of `nvfp4_grouped.py` for many tokens an expert: the large matrix instruction, weights in registers.

Activations lie in word order (`quant/gpu/nvfp4_words.py`). Results are those of `nvfp4_grouped.py`, bit for bit.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl

from ...quant.gpu.nvfp4_widen import DEPTH, EPILOGUE, HALF, SCALES
from ...quant.gpu.nvfp4_words import WORDS, word_step
from .grouped_gemm import find_block, store_gated


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
):
    """`nvfp4_grouped.grouped_gate_up` with x in word order; codes and scales are read as int32."""
    expert, pair, exists = find_block(sorted_ptr, expert_ptr, num_pairs, TOKENS, SORTED, EARLY)
    if expert < 0:
        return
    token = tl.where(exists, pair // TOP_K, 0)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    steps = K // DEPTH
    w_ptr += expert * steps * (2 * WORDS) * inner + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scale_ptr += expert * steps * 4 * inner + row[:, None] + tl.arange(0, SCALES)[None, :] * 0  # for each scale of it
    up_ptr, up_scale_ptr = w_ptr + inner * WORDS, scale_ptr + inner
    x_ptr += token.to(tl.int64)[None, :] * K + k[:, None]
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        x0, x1 = tl.load(x_ptr + step * DEPTH), tl.load(x_ptr + step * DEPTH + HALF)
        at, scale_at, half = step * (2 * WORDS) * inner, step * 4 * inner, 2 * inner
        scales0, scales1 = tl.load(scale_ptr + scale_at), tl.load(scale_ptr + scale_at + half)
        gate = word_step(tl.load(w_ptr + at), scales0, scales1, x0, x1, gate, ASSEMBLY)
        scales0, scales1 = tl.load(up_scale_ptr + scale_at), tl.load(up_scale_ptr + scale_at + half)
        up = word_step(tl.load(up_ptr + at), scales0, scales1, x0, x1, up, ASSEMBLY)
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
):
    """`nvfp4_grouped.grouped_down` with x in word order; codes and scales are read as int32."""
    expert, pair, exists = find_block(sorted_ptr, expert_ptr, num_pairs, TOKENS, SORTED, EARLY)
    if expert < 0:
        return
    source = tl.where(exists, pair, 0).to(tl.int64)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    steps = K // DEPTH
    w_ptr += expert * steps * WORDS * N + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scale_ptr += expert * steps * 2 * N + row[:, None] + tl.arange(0, SCALES)[None, :] * 0
    x_ptr += source[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        x0, x1 = tl.load(x_ptr + step * DEPTH), tl.load(x_ptr + step * DEPTH + HALF)
        scales0, scales1 = tl.load(scale_ptr + step * 2 * N), tl.load(scale_ptr + step * 2 * N + N)
        total = word_step(tl.load(w_ptr + step * WORDS * N), scales0, scales1, x0, x1, total, ASSEMBLY)
    total = total * (tl.load(row_scale_ptr + expert * N + row) * EPILOGUE)[:, None]
    if SCALED:
        total = total * tl.load(x_scale_ptr + source)[None, :]
    tl.store(out_ptr + pair.to(tl.int64)[None, :] * N + row[:, None], total.to(tl.bfloat16), mask=exists[None, :])
