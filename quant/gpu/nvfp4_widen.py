"""NVFP4 weights widened in registers: packed codes and block scales -> BF16 operands of a matrix product, exactly.

Weights lie as `nvfp4_packing.py` says. A word of four bytes holds four codes of the first half of a step of 128, A0 A1
B0 B1, and four of its second, C0 C1 D0 D1: 0 in its lower sixteen bits and 1 in the upper, but for three signs, which
change places. Signs are capital letters, magnitudes small ones:

    bit      15  14  13  12  11  10   9   8 7 6   5   4   3   2 1 0
    is        A   d   d   b   b   b   C   a a a   D   d   B   c c c

so that one or two rotations or shifts and as many masks make two BF16 numbers of each: the sign at 15, exponent and
mantissa at 8 to 6. Such a number is the code's value times 2**-126. B goes right by 4 (its signs pass the word's ends),
C left by 6, D's last bit left by 2 and the rest of it right by 6 (its signs pass the ends). The block scale comes times
2**118; the epilogue puts back 2**8.
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
            and.b32 a, $2, 0x81C081C0; shf.r.wrap.b32 b, $2, $2, 4; and.b32 b, b, 0x81C081C0;
            mul.rn.bf16x2 $0, a, $3; mul.rn.bf16x2 $1, b, $3; }""",
            "=&r,=&r,r,r,r,r,r",
            [packed, scale],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    word = _words(packed)
    return times_scale(_in_turn(pair_a(word), pair_b(word)).reshape(packed.shape), scale)


@triton.jit
def second_half(packed, scales, ASSEMBLY: tl.constexpr):
    """The same of codes C and D."""
    scale = _spread(scales)
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c;
            shl.b32 a, $2, 6; and.b32 a, a, 0x81C081C0;
            shl.b32 c, $2, 2; and.b32 c, c, 0x00400040;
            shf.r.wrap.b32 b, $2, $2, 6; lop3.b32 b, b, 0x81808180, c, 0xEA;
            mul.rn.bf16x2 $0, a, $3; mul.rn.bf16x2 $1, b, $3; }""",
            "=&r,=&r,r,r,r,r,r",
            [packed, scale],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    word = _words(packed)
    return times_scale(_in_turn(pair_c(word), pair_d(word)).reshape(packed.shape), scale)


@triton.jit
def _spread(scales):
    """UE5M3 uint8 [S, R, 4] -> int32 [S, R, 64], a word of two BF16 scales for every place."""
    words = scales.to(tl.int32) * BOTH + BIAS
    S: tl.constexpr = scales.shape[0]
    R: tl.constexpr = scales.shape[1]
    return tl.broadcast_to(words[:, :, None, :, None], (S, R, 4, 4, 4)).reshape(S, R, HALF)


# What follows says the same without assembly, for the interpreter.


@triton.jit
def pair_a(word):
    """uint32 -> uint32, two BF16 numbers."""
    return word & 0x81C081C0


@triton.jit
def pair_b(word):
    return ((word >> 4) | (word << 28)) & 0x81C081C0


@triton.jit
def pair_c(word):
    return (word << 6) & 0x81C081C0


@triton.jit
def pair_d(word):
    return (((word >> 6) | (word << 26)) & 0x81808180) | ((word << 2) & 0x00400040)


@triton.jit
def _words(packed):
    """uint8 [S, R, 64] -> uint32 [S * R * 16]."""
    low, high = tl.split(packed.to(tl.uint32).reshape(packed.numel // 4, 2, 2))
    first, second = tl.split(low | (high << 8))
    return first | (second << 16)


@triton.jit
def _in_turn(pair, next_pair):
    """uint32 [words] -> [words, 2, 2]: the two numbers of `pair`, then those of `next_pair`."""
    return tl.join(tl.join(pair & 0xFFFF, next_pair & 0xFFFF), tl.join(pair >> 16, next_pair >> 16))


@triton.jit
def times_scale(bits, scale):
    """BF16 bits times the BF16 number in the low half of scale."""
    codes = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    scale = (scale & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return (codes.to(tl.float32) * scale.to(tl.float32)).to(tl.bfloat16)
