"""The products of `nvfp4_grouped.py` for many tokens an expert: the large matrix instruction, weights in registers.

A thread of that instruction holds two neighbours along K of a row where one of the small instruction holds four, so a
word's four codes go to other columns of the step, and x must lie in the order of these columns: `in_word_order`.

    column 16 c + 8 h + 2 q + b of a half <- k = 16 q + 4 c + 2 h + b: word 4 c + q, its code 2 h + b
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...quant.gpu.device import on_own_device
from ...quant.gpu.nvfp4_widen import BIAS, BOTH, DEPTH, EPILOGUE, HALF, SCALES
from .grouped_gemm import pair_rows, store_gated

WORDS = tl.constexpr(16)  # of a row and a step
FIRST = tl.constexpr(
    """{ .reg .b32 a, b;
    and.b32 a, $4, 0x81C081C0; shl.b32 b, $4, 3; and.b32 b, b, 0x81C081C0;
    mul.rn.bf16x2 a, a, $5; mul.rn.bf16x2 b, b, $5; mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }"""
)
SECOND = tl.constexpr(
    """{ .reg .b32 a, b, c, d;
    shl.b32 a, $4, 6; and.b32 a, a, 0x81C081C0;
    shl.b32 b, $4, 1; and.b32 b, b, 0x80008000;
    shr.u32 c, $4, 5; lop3.b32 b, c, 0x01000100, b, 0xEA;
    shr.u32 d, $4, 4; lop3.b32 b, d, 0x00C000C0, b, 0xEA;
    mul.rn.bf16x2 a, a, $5; mul.rn.bf16x2 b, b, $5; mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }"""
)


@triton.jit
def _widened(words, scales, SECOND_HALF: tl.constexpr, ASSEMBLY: tl.constexpr):
    """int32 [ROWS, 16], UE5M3 [ROWS, 4] -> BF16 [ROWS, 64]: one half's codes times scales, times 2**-8."""
    R: tl.constexpr = words.shape[0]
    scale = scales.to(tl.int32) * BOTH + BIAS
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
        low, high = words & 0xFFFF, (words >> 16) & 0xFFFF
        if SECOND_HALF:
            e0, e1, e2, e3 = low << 6, high << 6, _last(low), _last(high)
        else:
            e0, e1, e2, e3 = low, high, low << 3, high << 3
        e0, e1, e2, e3 = _times(e0, scale), _times(e1, scale), _times(e2, scale), _times(e3, scale)
    codes = tl.join(tl.join(e0, e1), tl.join(e2, e3)).reshape(R, 4, 4, 2, 2)  # c, q, b, h
    return tl.permute(codes, (0, 1, 4, 2, 3)).reshape(R, HALF)


@triton.jit
def _last(bits):
    return ((bits << 1) & 0x8000) | ((bits >> 5) & 0x0100) | ((bits >> 4) & 0x00C0)


@triton.jit
def _times(bits, scale):
    """What the assembly's last line does, for the interpreter."""
    code = (bits & 0x81C0).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    scale = (scale & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True).to(tl.float32)
    return (code * scale).to(tl.bfloat16)


@triton.jit
def _step(words, scales0, scales1, x0, x1, total, ASSEMBLY: tl.constexpr):
    total = tl.dot(_widened(words, scales0, False, ASSEMBLY), x0, total)
    return tl.dot(_widened(words, scales1, True, ASSEMBLY), x1, total)


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
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """`nvfp4_grouped.gate_up` with x in word order and w_ptr int32."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pair, exists = pair_rows(sorted_ptr, tl.program_id(1), num_pairs, TOKENS)
    token = tl.where(exists, pair // TOP_K, 0)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    steps = K // DEPTH
    w_ptr += expert * steps * (2 * WORDS) * inner + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scale_ptr += expert * steps * (4 * SCALES) * inner + row[:, None] * SCALES + tl.arange(0, SCALES)[None, :]
    up_ptr, up_scale_ptr = w_ptr + inner * WORDS, scale_ptr + inner * SCALES
    x_ptr += token.to(tl.int64)[None, :] * K + k[:, None]
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    half = 2 * SCALES * inner
    for step in tl.range(0, steps, num_stages=STAGES):
        x0, x1 = tl.load(x_ptr + step * DEPTH), tl.load(x_ptr + step * DEPTH + HALF)
        at, scale_at = step * (2 * WORDS) * inner, step * (4 * SCALES) * inner
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
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """`nvfp4_grouped.down` with x in word order and w_ptr int32."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pair, exists = pair_rows(sorted_ptr, tl.program_id(1), num_pairs, TOKENS)
    source = tl.where(exists, pair, 0).to(tl.int64)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    steps = K // DEPTH
    w_ptr += expert * steps * WORDS * N + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    scale_ptr += expert * steps * (2 * SCALES) * N + row[:, None] * SCALES + tl.arange(0, SCALES)[None, :]
    x_ptr += source[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        x0, x1 = tl.load(x_ptr + step * DEPTH), tl.load(x_ptr + step * DEPTH + HALF)
        scale_at = step * (2 * SCALES) * N
        scales0, scales1 = tl.load(scale_ptr + scale_at), tl.load(scale_ptr + scale_at + SCALES * N)
        total = _step(tl.load(w_ptr + step * WORDS * N), scales0, scales1, x0, x1, total, ASSEMBLY)
    total = total * (tl.load(row_scale_ptr + expert * N + row) * EPILOGUE)[:, None]
    if SCALED:
        total = total * tl.load(x_scale_ptr + source)[None, :]
    tl.store(out_ptr + pair.to(tl.int64)[None, :] * N + row[:, None], total.to(tl.bfloat16), mask=exists[None, :])


@triton.jit
def word_order_kernel(x_ptr, out_ptr, size, CHUNK: tl.constexpr):
    """Columns 2 q + b of an eighth h of 16 c: 64 numbers after 64 numbers."""
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    place = at % HALF
    source = at - place + (place >> 1) % 4 * 16 + (place >> 4) * 4 + (place >> 3) % 2 * 2 + place % 2
    tl.store(out_ptr + at, tl.load(x_ptr + source, mask=at < size), mask=at < size)


@on_own_device
def in_word_order(x: Tensor) -> Tensor:
    """BF16 [tokens, K], K a multiple of 64 -> the same numbers, every 64 columns in the order drawn above."""
    out = x.new_empty(x.shape)
    if x.numel():
        word_order_kernel[(-(-x.numel() // 4096),)](x, out, x.numel(), CHUNK=4096, num_warps=8)
    return out
