"""NVFP4 weights as the left operand of the large matrix instruction: widened in registers, word by word.

A thread of that instruction holds two neighbours along K of a row where one of the small instruction holds four, so a
word's four codes go to other columns of the step, and x must lie in the order of these columns: `in_word_order`.
Sixteen columns are what either instruction sums at once: the same numbers as in `nvfp4_widen.py`, to the bit.

    column 32 d + 16 h + 8 c + 2 q + b of a half <- k = 16 q + 8 d + 4 c + 2 h + b: word 8 d + 4 c + q, its code 2 h + b
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device
from .nvfp4_widen import BIAS, BOTH, DEPTH, HALF, SCALES, pair_a, pair_b, pair_c, pair_d, times_scale

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
def word_step(words, scales0, scales1, x0, x1, total, ASSEMBLY: tl.constexpr):
    """One step: codes int32 [ROWS, 16] times both halves of x, BF16 [64, TOKENS] in word order."""
    total = tl.dot(_widened(words, scales0, False, ASSEMBLY), x0, total)
    return tl.dot(_widened(words, scales1, True, ASSEMBLY), x1, total)


@triton.jit
def word_order_kernel(x_ptr, out_ptr, size, K, padded, WHOLE: tl.constexpr, CHUNK: tl.constexpr):
    """64 numbers after 64 numbers, in the order drawn above; zeros behind K where it is not WHOLE steps."""
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    place = (at % HALF).to(tl.int32)
    q, c, h, d = (place >> 1) & 3, (place >> 3) & 1, (place >> 4) & 1, place >> 5
    source, inside = at - place + 16 * q + 8 * d + 4 * c + 2 * h + (place & 1), at < size
    if not WHOLE:
        row, col = source // padded, source % padded
        source, inside = row * K + col, inside & (col < K)
    tl.store(out_ptr + at, tl.load(x_ptr + source, mask=inside, other=0.0), mask=at < size)


@on_own_device
def in_word_order(x: Tensor) -> Tensor:
    """BF16 [tokens, K] -> the same numbers, every 64 columns in the order drawn above, zeros up to a whole step."""
    K = x.shape[1]
    padded = -(-K // DEPTH.value) * DEPTH.value
    out = x.new_empty(len(x), padded)
    if out.numel():
        grid = (-(-out.numel() // 2048),)
        word_order_kernel[grid](x, out, out.numel(), K, padded, WHOLE=padded == K, CHUNK=2048, num_warps=4)
    return out
