"""x W^T in float32, of which a row has the same bits with any number of others: one tile for all of them.

For what few models multiply in float32: routers. Products and sums are those of float32's own units.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device

TILE = {"TOKENS": 16, "ROWS": 16, "DEPTH": 64}


@triton.jit(do_not_specialize=["M", "N", "K"])
def float32_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIAS: tl.constexpr,
):
    """x [M, K], w [N, K], bias [N] -> [M, N]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    k = tl.arange(0, DEPTH)
    x_ptr += token.to(tl.int64) * K + k[None, :]
    w_ptr += row.to(tl.int64) * K + k[:, None]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for step in range(0, K, DEPTH):
        left = k < K - step
        x = tl.load(x_ptr + step, mask=(token < M) & left[None, :], other=0.0)
        w = tl.load(w_ptr + step, mask=(row < N) & left[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + row, mask=row < N, other=0.0)
    tl.store(out_ptr + token.to(tl.int64) * N + row, total, mask=(token < M) & (row < N))


@on_own_device
def float32_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """float32 x [M, K] times weight [N, K] transposed, plus bias [N] -> float32 [M, N]."""
    (M, K), N = x.shape, len(weight)
    out = x.new_empty(M, N)
    if M:
        float32_kernel[(-(-N // TILE["ROWS"]), -(-M // TILE["TOKENS"]))](
            x.contiguous(), weight, weight if bias is None else bias, out, M, N, K,
            **TILE, BIAS=bias is not None, num_warps=4,
        )  # fmt: skip
    return out
