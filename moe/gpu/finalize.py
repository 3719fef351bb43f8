"""The weighted sum over a token's choices."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...quant.gpu.device import on_own_device
from ...quant.gpu.early import await_inputs, early

COLS = 1024  # of a program


@triton.jit
def sum_choices(x_ptr, place_ptr, weight_ptr, rows, cols, num_rows, N, TOP_K: tl.constexpr, PLACED: tl.constexpr):
    """Some rows and columns of BF16 [num_rows, N]: the sum of a row's TOP_K choices in their order, in float32.

    PLACED: `place_ptr` says in which rows of x they lie; else they lie one below the other.
    """
    mask = (rows < num_rows)[:, None] & (cols < N)[None, :]
    total = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = rows.to(tl.int64) * TOP_K + choice
        place = tl.load(place_ptr + pair, mask=rows < num_rows, other=0).to(tl.int64) if PLACED else pair
        x = tl.load(x_ptr + place[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + pair, mask=rows < num_rows, other=0.0)[:, None]
    return total.to(tl.bfloat16)


@triton.jit
def finalize_kernel(
    x_ptr,
    place_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    N,
    TOP_K: tl.constexpr,
    PLACED: tl.constexpr,
    COLS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`sum_choices`, a program for some columns of a row."""
    await_inputs(EARLY)
    row, cols = tl.program_id(0) + tl.arange(0, 1), tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = sum_choices(x_ptr, place_ptr, weight_ptr, row, cols, num_rows, N, TOP_K, PLACED)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * N + cols[None, :], total, mask=(cols < N)[None, :])


@on_own_device
def finalize(x: Tensor, weights: Tensor, places: Tensor | None = None) -> Tensor:
    """BF16 x [rows, N], weights float32 [tokens, top_k] -> BF16 [tokens, N].

    `places` int32 [tokens, top_k]: a choice's row of x; without it x has tokens * top_k rows, in order.
    """
    (tokens, top_k), N = weights.shape, x.shape[1]
    out = x.new_empty(tokens, N)
    if tokens:
        finalize_kernel[(tokens, -(-N // COLS))](
            x, weights if places is None else places, weights, out, tokens, N,
            TOP_K=top_k, PLACED=places is not None, COLS=COLS, num_warps=4, **early(x),
        )  # fmt: skip
    return out
