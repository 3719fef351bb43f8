"""The products of `nvfp4_grouped.py` for many tokens an expert: the large matrix instruction, weights in registers.

A thread of that instruction holds two neighbours along K of a row where one of the small instruction holds four, so a
word's four codes go to other columns of the step, and x must lie in the order of these columns: `in_word_order`.
Sixteen columns are what either instruction sums at once: results are those of `nvfp4_grouped.py`, bit for bit.

    column 32 d + 16 h + 8 c + 2 q + b of a half <- k = 16 q + 8 d + 4 c + 2 h + b: word 8 d + 4 c + q, its code 2 h + b
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...quant.gpu.device import on_own_device
from ...quant.gpu.nvfp4_widen import (
    BIAS,
    BOTH,
    DEPTH,
    EPILOGUE,
    HALF,
    SCALES,
    pair_a,
    pair_b,
    pair_c,
    pair_d,
    times_scale,
)
from .grouped_gemm import find_block, store_gated

WORDS = tl.constexpr(16)  # of a row and a step
FIRST = tl.constexpr(
    """{ .reg .b32 a, b;
    and.b32 a, $4, 0x81C081C0; shf.r.wrap.b32 b, $4, $4, 4; and.b32 b, b, 0x81C081C0;
    mul.rn.bf16x2 a, a, $5; mul.rn.bf16x2 b, b, $5; mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }"""
)
SECOND = tl.constexpr(
    """{ .reg .b32 a, b, c;
    shl.b32 a, $4, 6; and.b32 a, a, 0x81C081C0;
    shl.b32 c, $4, 2; and.b32 c, c, 0x00400040;
    shf.r.wrap.b32 b, $4, $4, 6; lop3.b32 b, b, 0x81808180, c, 0xEA;
    mul.rn.bf16x2 a, a, $5; mul.rn.bf16x2 b, b, $5; mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }"""
)


@triton.jit
def _widened(words, scales, SECOND_HALF: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int32 [ROWS, 16], UE5M3 in int32 [ROWS, 4] -> BF16 [ROWS, 64]: one half's codes times scales, times 2**-8."""
    R: tl.constexpr = words.shape[0]
    scale = ((scales >> (tl.arange(0, SCALES) * 8)[None, :]) & 0xFF) * BOTH + BIAS
    scale = tl.broadcast_to(scale[:, None, :], (R, 4, 4)).reshape(R, WORDS)  # the block scale q of word 4 c + q
    if ASSEMBLY:
        e0, e1, e2, e3 = tl.inline_asm_elementwise(
            SECOND if SECOND_HALF else FIRST,
            "=&h,=&h,=&h,=&h,r,r",
            [words, scale],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
    else:
        word = words.to(tl.uint32, bitcast=True)
        first = pair_c(word) if SECOND_HALF else pair_a(word)
        second = pair_d(word) if SECOND_HALF else pair_b(word)
        e0, e1 = times_scale(first & 0xFFFF, scale), times_scale(first >> 16, scale)
        e2, e3 = times_scale(second & 0xFFFF, scale), times_scale(second >> 16, scale)
    codes = tl.join(tl.join(e0, e1), tl.join(e2, e3)).reshape(R, 2, 2, 4, 2, 2)  # d, c, q, b, h
    return tl.permute(codes, (0, 1, 5, 2, 3, 4)).reshape(R, HALF)


@triton.jit
def _step(words, scales0, scales1, x0, x1, total, ASSEMBLY: tl.constexpr):
    total = tl.dot(_widened(words, scales0, False, ASSEMBLY), x0, total)
    return tl.dot(_widened(words, scales1, True, ASSEMBLY), x1, total)


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
    ASSEMBLY: tl.constexpr,
):
    """`nvfp4_grouped.grouped_gate_up` with x in word order; codes and scales are read as int32."""
    expert, pair, exists = find_block(sorted_ptr, expert_ptr, num_pairs, TOKENS, SORTED)
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
        gate = _step(tl.load(w_ptr + at), scales0, scales1, x0, x1, gate, ASSEMBLY)
        scales0, scales1 = tl.load(up_scale_ptr + scale_at), tl.load(up_scale_ptr + scale_at + half)
        up = _step(tl.load(up_ptr + at), scales0, scales1, x0, x1, up, ASSEMBLY)
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
    ASSEMBLY: tl.constexpr,
):
    """`nvfp4_grouped.grouped_down` with x in word order; codes and scales are read as int32."""
    expert, pair, exists = find_block(sorted_ptr, expert_ptr, num_pairs, TOKENS, SORTED)
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
        total = _step(tl.load(w_ptr + step * WORDS * N), scales0, scales1, x0, x1, total, ASSEMBLY)
    total = total * (tl.load(row_scale_ptr + expert * N + row) * EPILOGUE)[:, None]
    if SCALED:
        total = total * tl.load(x_scale_ptr + source)[None, :]
    tl.store(out_ptr + pair.to(tl.int64)[None, :] * N + row[:, None], total.to(tl.bfloat16), mask=exists[None, :])


@triton.jit
def word_order_kernel(x_ptr, out_ptr, size, CHUNK: tl.constexpr):
    """64 numbers after 64 numbers, in the order drawn above."""
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    place = at % HALF
    q, c, h, d = (place >> 1) & 3, (place >> 3) & 1, (place >> 4) & 1, place >> 5
    source = at - place + 16 * q + 8 * d + 4 * c + 2 * h + (place & 1)
    tl.store(out_ptr + at, tl.load(x_ptr + source, mask=at < size), mask=at < size)


@on_own_device
def in_word_order(x: Tensor) -> Tensor:
    """BF16 [tokens, K], K a multiple of 64 -> the same numbers, every 64 columns in the order drawn above."""
    out = x.new_empty(x.shape)
    if x.numel():
        word_order_kernel[(-(-x.numel() // 4096),)](x, out, x.numel(), CHUNK=4096, num_warps=8)
    return out
