"""The end of the dense NVFP4 products: what it reads is asked for before the sums begin: memory is slow to answer."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl

from .nvfp4_widen import EPILOGUE


@triton.jit
def load_scales(
    row_scale_ptr,
    token_scale_ptr,
    bias_ptr,
    row,
    token,
    M,
    end_row,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Scales of rows and of tokens and the bias, float32; `row` and `token` span the tile. Zeros where there is none.

    SCALED: 0 no scale, 1 of each token, 2 of all.
    """
    mine = row < end_row
    row_scale = tl.load(row_scale_ptr + row, mask=mine, other=0.0) * EPILOGUE
    token_scale, bias = tl.zeros((1, 1), tl.float32), tl.zeros((1, 1), tl.float32)
    if SCALED == 1:
        token_scale = tl.load(token_scale_ptr + token, mask=token < M, other=0.0)
    if SCALED == 2:
        token_scale += tl.load(token_scale_ptr)
    if BIAS:
        bias = tl.load(bias_ptr + row, mask=mine, other=0.0).to(tl.float32)
    return row_scale, token_scale, bias


@triton.jit
def store_scaled(
    total,
    row_scale,
    token_scale,
    bias,
    out_ptr,
    row,
    token,
    M,
    N,
    end_row,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Row and token scales and the bias in float32, then one rounding."""
    total = total * row_scale
    if SCALED:
        total = total * token_scale
    if BIAS:
        total += bias
    tl.store(out_ptr + token.to(tl.int64) * N + row, total.to(tl.bfloat16), mask=(row < end_row) & (token < M))
