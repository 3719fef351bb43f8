"""NVFP4 weights widened in registers: packed codes and block scales -> BF16 operands of a matrix product, exactly.

Weights lie as `nvfp4_packing.py` says. A word of four bytes holds four codes of the first half of a step of 128 and
four of its second; in each of its 16-bit halves, from the top:

    sign of: A D B C   magnitude of: D(1) A(3) B(3) C(3), with two bits of D's above A's

    bit      15  14  13  12  11  10   9   8 7 6   5 4 3   2 1 0
    is       A   D   d2  B   d1  d0   C   a a a   b b b   c c c

so that a shift to the left and a mask make BF16 numbers of A, B and C: the sign at 15, exponent and mantissa at 8 to 6.
Such a number is the code's value times 2**-126. The block scale comes times 2**118; the epilogue puts back 2**8.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl

DEPTH = tl.constexpr(128)  # weights of a step along K
HALF = tl.constexpr(64)
SCALES = tl.constexpr(4)  # block scales of a half
BOTH = tl.constexpr(0x00100010)  # UE5M3 scale << 4, in both halves of a word
BIAS = tl.constexpr(((127 - 12 + 118) << 7) * 0x00010001)  # BF16 bits of 2**118 over the bias of UE5M3
EPILOGUE = tl.constexpr(256.0)  # 2**126 / 2**118


@triton.jit
def real_order():
    """Where the weights at the 64 places of a half come from: a thread of the product meets one block scale only.

    place 16 c + 4 q + i <- k = 16 q + 4 c + i
    """
    place = tl.arange(0, HALF)
    order = ((place >> 2) & 3) * 16 + (place >> 4) * 4 + (place & 3)
    return tl.max_contiguous(tl.multiple_of(order, 4), 4)


@triton.jit
def first_half(packed, scales, ASSEMBLY: tl.constexpr):
    """uint8 [S, R, 64], UE5M3 [S, R, 4] -> BF16 [S, R, 64]: codes A and B times their scales, times 2**-8."""
    scale = _spread(scales)
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b;
            and.b32 a, $2, 0x81C081C0; shl.b32 b, $2, 3; and.b32 b, b, 0x81C081C0;
            mul.rn.bf16x2 $0, a, $3; mul.rn.bf16x2 $1, b, $3; }""",
            "=&r,=&r,r,r,r,r,r",
            [packed, scale],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    word = _halfwords(packed)
    return _scaled(_in_turn(word, word << 3, packed.shape), scale)


@triton.jit
def second_half(packed, scales, ASSEMBLY: tl.constexpr):
    """The same of codes C and D."""
    scale = _spread(scales)
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d;
            shl.b32 a, $2, 6; and.b32 a, a, 0x81C081C0;
            shl.b32 b, $2, 1; and.b32 b, b, 0x80008000;
            shr.u32 c, $2, 5; lop3.b32 b, c, 0x01000100, b, 0xEA;
            shr.u32 d, $2, 4; lop3.b32 b, d, 0x00C000C0, b, 0xEA;
            mul.rn.bf16x2 $0, a, $3; mul.rn.bf16x2 $1, b, $3; }""",
            "=&r,=&r,r,r,r,r,r",
            [packed, scale],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    word = _halfwords(packed)
    last = ((word << 1) & 0x8000) | ((word >> 5) & 0x0100) | ((word >> 4) & 0x00C0)
    return _scaled(_in_turn(word << 6, last, packed.shape), scale)


@triton.jit
def _spread(scales):
    """UE5M3 uint8 [S, R, 4] -> int32 [S, R, 64], a word of two BF16 scales for every place."""
    words = scales.to(tl.int32) * BOTH + BIAS
    S: tl.constexpr = scales.shape[0]
    R: tl.constexpr = scales.shape[1]
    return tl.broadcast_to(words[:, :, None, :, None], (S, R, 4, 4, 4)).reshape(S, R, HALF)


# What follows says the same without assembly, for the interpreter.


@triton.jit
def _halfwords(packed):
    """uint8 [S, R, 64] -> int32 [S * R * 16, 2]: the low and the high half of every word."""
    low, high = tl.split(packed.to(tl.int32).reshape(packed.numel // 4, 2, 2))
    return low | (high << 8)


@triton.jit
def _in_turn(pair, next_pair, shape: tl.constexpr):
    """Codes 0 and 1, then 2 and 3, of every word."""
    codes = tl.join(pair & 0x81C0, next_pair & 0x81C0)  # [words, half of the word, pair]
    return tl.permute(codes, (0, 2, 1)).reshape(shape)


@triton.jit
def _scaled(bits, scale):
    codes = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    scale = (scale & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return (codes.to(tl.float32) * scale.to(tl.float32)).to(tl.bfloat16)
