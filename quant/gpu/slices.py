"""K cut into slices, one a warp: split-K within a program, whose parts are added in order."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_in_order(parts):
    """[SLICES, ROWS, TOKENS] -> [ROWS, TOKENS], part after part: ((p0 + p1) + p2) + ..."""
    SLICES: tl.constexpr = parts.shape[0]
    R: tl.constexpr = parts.shape[1]
    T: tl.constexpr = parts.shape[2]
    last = tl.permute(parts, (1, 2, 0))
    if SLICES == 1:
        total = last.reshape(R, T)
    elif SLICES == 2:
        p0, p1 = tl.split(last)
        total = p0 + p1
    elif SLICES == 4:
        even, odd = tl.split(last.reshape(R, T, 2, 2))
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
        total = ((p0 + p1) + p2) + p3
    else:
        even, odd = tl.split(last.reshape(R, T, 2, 2, 2))
        p04, p26 = tl.split(even)
        p15, p37 = tl.split(odd)
        p0, p4 = tl.split(p04)
        p2, p6 = tl.split(p26)
        p1, p5 = tl.split(p15)
        p3, p7 = tl.split(p37)
        total = ((((((p0 + p1) + p2) + p3) + p4) + p5) + p6) + p7
    return total
