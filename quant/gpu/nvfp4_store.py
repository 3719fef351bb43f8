"""The end of the dense NVFP4 products."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl

from .nvfp4_widen import EPILOGUE


@triton.jit
def store_scaled(
    total,
    row_scale_ptr,
    token_scale_ptr,
    bias_ptr,
    out_ptr,
    row,
    token,
    M,
    N,
    end_row,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Row and token scales and the bias in float32, then one rounding; `row` and `token` span the tile.

    SCALED: 0 no scale, 1 of each token, 2 of all.
    """
    mine = row < end_row
    total = total * (tl.load(row_scale_ptr + row, mask=mine, other=0.0) * EPILOGUE)
    if SCALED == 1:
        total = total * tl.load(token_scale_ptr + token, mask=token < M, other=0.0)
    if SCALED == 2:
        total = total * tl.load(token_scale_ptr)
    if BIAS:
        total += tl.load(bias_ptr + row, mask=mine, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * N + row, total.to(tl.bfloat16), mask=mine & (token < M))
