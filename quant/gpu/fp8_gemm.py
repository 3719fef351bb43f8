"""x W^T of FP8 codes for few tokens: the weight's rows are the tall side of a tile, and K is cut into slices.

Every warp of a program sums one slice, step by step; then the slices are added in order. How K is cut says the shape
alone, so that a token's result depends on no other token, nor on how many there are. Hopper widens the codes to FP16
on their way into the matrix units: products are exact, sums are float32.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device
from .early import await_inputs, early, fetch
from .slices import sum_in_order


class Tile(NamedTuple):
    """Rows of the weight and tokens of a program, columns of a step of a slice, steps that are loaded ahead."""

    rows: int
    tokens: int
    depth: int
    stages: int


SLICES = 4
CUT = 256  # slices are multiples of it, whatever the depth of a step
# Tokens, at the most -> tile. Measured on an H100: benchmarks/NOTES.md.
TILES = (
    (8, Tile(16, 8, 256, 4)),
    (16, Tile(16, 16, 256, 3)),
    (32, Tile(16, 32, 128, 3)),
    (64, Tile(32, 32, 128, 4)),
)
FETCHED = 8  # tokens, at the most, for which it pays to fetch the first step's codes before the wait
MANY_ROWS, MANY_COLS = 4096, 8192  # above, `fp8_middle` is faster from 17 tokens on


@triton.jit(do_not_specialize=["M", "steps"])
def few_tokens_kernel(
    x_ptr,
    token_scale_ptr,
    w_ptr,
    row_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    steps,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    EACH: tl.constexpr,
    BIAS: tl.constexpr,
    FETCH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Codes x [M, K], w [N, K] -> BF16 [M, N]; a slice is `steps` times DEPTH columns. EACH: a scale a token."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    if EARLY and FETCH:
        line = tl.arange(0, SLICES)[:, None] * (steps * DEPTH) + tl.arange(0, DEPTH // 128)[None, :] * 128
        source = tl.where(row < N, row, 0).to(tl.int64)[:, None, None] * K
        fetch(w_ptr + source + tl.minimum(line, K - 1)[None, :, :])
    await_inputs(EARLY)
    row_scale = tl.load(row_scale_ptr + row, mask=row < N, other=0.0)  # now: memory is slow to answer
    if EACH:
        token_scale = tl.load(token_scale_ptr + token, mask=token < M, other=0.0)[None, :]
    else:
        token_scale = tl.load(token_scale_ptr)
    if BIAS:
        bias = tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    start = tl.arange(0, SLICES)[:, None] * (steps * DEPTH) + tl.arange(0, DEPTH)[None, :]
    inside = (token < M)[None, None, :]  # others read nothing: one line that all programs ask for is slow to come
    w_ptr += tl.where(row < N, row, 0).to(tl.int64)[None, :, None] * K + start[:, None, :]
    x_ptr += token.to(tl.int64)[None, None, :] * K + start[:, :, None]
    total = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        at = step * DEPTH
        if RAGGED:
            left = start < K - at
            w = tl.load(w_ptr + at, mask=left[:, None, :], other=0.0)
            x = tl.load(x_ptr + at, mask=inside & left[:, :, None], other=0.0)
        else:
            w, x = tl.load(w_ptr + at), tl.load(x_ptr + at, mask=inside, other=0.0)
        total = tl.dot(w, x, total)
    total, row, token = sum_in_order(total) * row_scale[:, None] * token_scale, row[:, None], token[None, :]
    if BIAS:
        total += bias[:, None]
    tl.store(out_ptr + token.to(tl.int64) * N + row, total.to(tl.bfloat16), mask=(row < N) & (token < M))


def most_tokens(num_rows: int, cols: int) -> int:
    """Up to how many tokens `few_tokens` is the fastest, for a weight [num_rows, cols].

    None where some slice would be empty: there is little to gain on so few columns.
    """
    if cols <= (SLICES - 1) * CUT:
        return 0
    return 32 if num_rows <= MANY_ROWS and cols <= MANY_COLS else 16


@on_own_device
def few_tokens(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    num_rows: int,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """E4M3 codes [M, K] and weight [at least num_rows, K], row-major, K a multiple of 16 -> BF16 [M, num_rows], in
    `out` where it is given.

    Decode scales: `scale` float32 [M], or one for all, `row_scale` float32, one a row. `bias` [num_rows].
    """
    M, K = codes.shape
    tile = next(tile for most, tile in TILES if most >= min(M, TILES[-1][0]))
    out = torch.empty(M, num_rows, dtype=torch.bfloat16, device=codes.device) if out is None else out
    assert out.is_contiguous()
    part = -(-K // (SLICES * CUT)) * CUT
    if M:
        few_tokens_kernel[(-(-num_rows // tile.rows), -(-M // tile.tokens))](
            codes.contiguous(), scale, weight, row_scale, scale if bias is None else bias, out,
            M, num_rows, K, part // tile.depth,
            SLICES=SLICES, ROWS=tile.rows, TOKENS=tile.tokens, DEPTH=tile.depth, STAGES=tile.stages,
            RAGGED=SLICES * part != K, EACH=scale.numel() == M and M > 1, BIAS=bias is not None,
            FETCH=tile.tokens <= FETCHED, num_warps=SLICES, **early(codes),
        )  # fmt: skip
    return out
