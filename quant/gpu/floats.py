"""Roundings that kernels share: E2M1, E4M3, exact quotients. Bit-equal to `numerics`, in the interpreter too."""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
NVFP4_RANGE = tl.constexpr(2688.0)
SIXTH = tl.constexpr(0.16666667163372040)  # 1 / 6 in float32
ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2**23: sums with it are integers
E4M3_MIN = tl.constexpr(2.0**-9)  # smallest subnormal
LEAST_SCALE = tl.constexpr(1e-25)  # below, reciprocals and remainders would leave float32's normal range


@triton.jit
def e2m1_code(x, CLAMP: tl.constexpr):
    """float32 -> 4-bit code as int32 (bit 3 = sign), ties to the even code; with CLAMP saturating at 6.

    The code of a magnitude a is the least of round(2 a), round(a) + 2 and round(a / 2) + 4: the steps of the grid's
    octaves. Rounding is an addition to a number that has no bits below one; its low bits then count.
    """
    magnitude = tl.abs(x)
    low = tl.fma(magnitude, 2.0, ROUNDS)
    middle = magnitude + (ROUNDS + 2.0)
    high = tl.fma(magnitude, 0.5, ROUNDS + 4.0)
    rounded = tl.minimum(tl.minimum(low, middle), high)
    if CLAMP:
        rounded = tl.minimum(rounded, ROUNDS + 7.0)
    sign = x.to(tl.uint32, bitcast=True) >> 28  # and three bits below
    return ((rounded.to(tl.uint32, bitcast=True) & 7) | (sign & 8)).to(tl.int32, bitcast=True)


@triton.jit
def e2m1_value(code):
    """4-bit code as int32 -> float32; a zero has no sign. The three lines are the grid's octaves."""
    index = (code & 7).to(tl.float32)
    magnitude = tl.maximum(tl.maximum(index * 0.5, index - 2.0), index * 2.0 - 8.0)
    return tl.where((code & 8) != 0, 0.0 - magnitude, magnitude)


@triton.jit
def quotient(x, scale, reciprocal):
    """x / scale, rounded once, from reciprocal = 1 / scale rounded once: two fused steps (Markstein, 1990)."""
    guess = x * reciprocal
    excess = tl.fma(guess, scale, x * -1.0)  # signs so that -0 stays -0; Triton's unary minus is 0 - x
    return tl.fma(excess, 0.0 - reciprocal, guess)


@triton.jit
def pack_codes(codes, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int32 4-bit codes [ROWS, COLS] -> int32 [ROWS, COLS // 8], eight codes a word, low nibble = even k."""
    shifts = (tl.arange(0, 8) * 4)[None, None, :]
    return tl.sum(tl.reshape(codes, (ROWS, COLS // 8, 8)) << shifts, axis=2)


@triton.jit
def scale_offset(row, col, num_cols, LAYOUT: tl.constexpr):
    """Where the block scale (row, col) lies: LAYOUT 0 linear, 128 and 8 the swizzled tiles of `layout.py`."""
    tiles = (num_cols + 3) // 4
    if LAYOUT == 0:
        return row * num_cols + col
    if LAYOUT == 128:
        inner = (row % 32) * 16 + (row % 128) // 32 * 4 + col % 4
        return (row // 128 * tiles + col // 4) * 512 + inner
    return (row // 8 * tiles + col // 4) * 32 + (row % 8) * 4 + col % 4
