"""x W^T in BF16, of which a row has the same bits with any number of others.

K is cut into slices, by the shape alone; each is summed from zero, 16 columns after 16, and the slices' sums are added
in their order. For few tokens the slices are warps of a program, which has few rows of the weight; for more they follow
each other in large tiles. Both matrix instructions sum BF16 alike.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device
from .early import await_inputs, early
from .slices import sum_in_order


class Tile(NamedTuple):
    """Rows of the weight and tokens of a program, columns of a step, steps that are loaded ahead, warps."""

    rows: int
    tokens: int
    depth: int
    stages: int
    warps: int


SLICES = 4
CUT = 128  # slices are multiples of it: as in `moe/gpu/router.py`, which has the same bits
# Tokens, at the most -> tile of slices side by side.
FEW_TILES = (
    (8, Tile(16, 8, 128, 4, SLICES)),
    (16, Tile(16, 16, 128, 4, SLICES)),
    (32, Tile(16, 32, 128, 3, SLICES)),
)
SMALL, MIDDLE, LARGE = Tile(64, 32, 128, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 4, 8)
MANY_TILES = (SMALL, MIDDLE, LARGE)
MULTIPROCESSORS = 132


@triton.jit
def _store(total, bias_ptr, out_ptr, row, token, M, N, BIAS: tl.constexpr):
    """The bias in float32, then one rounding; `row` and `token` span the tile."""
    if BIAS:
        total += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + token.to(tl.int64) * N + row, total.to(tl.bfloat16), mask=(row < N) & (token < M))


@triton.jit(do_not_specialize=["M", "part"])
def few_tokens_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    part,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x [M, K], w [N, K] -> BF16 [M, N]; a slice of `part` times 128 columns a warp."""
    await_inputs(EARLY)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    start = tl.arange(0, SLICES)[:, None] * (part * 128) + tl.arange(0, DEPTH)[None, :]
    inside = (token < M)[None, None, :]  # others read nothing: one line that all programs ask for is slow to come
    w_ptr += tl.where(row < N, row, 0).to(tl.int64)[None, :, None] * K + start[:, None, :]
    x_ptr += token.to(tl.int64)[None, None, :] * K + start[:, :, None]
    total = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    for at in tl.range(0, part * 128, DEPTH, num_stages=STAGES):
        if RAGGED:
            left = start < K - at
            w = tl.load(w_ptr + at, mask=left[:, None, :], other=0.0)
            x = tl.load(x_ptr + at, mask=inside & left[:, :, None], other=0.0)
        else:
            w, x = tl.load(w_ptr + at), tl.load(x_ptr + at, mask=inside, other=0.0)
        total = tl.dot(w, x, total)
    _store(sum_in_order(total), bias_ptr, out_ptr, row[:, None], token[None, :], M, N, BIAS)


@triton.jit(do_not_specialize=["M", "part"])
def many_tokens_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    part,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The same, slice after slice; GROUP tiles of tokens share what the L2 holds."""
    await_inputs(EARLY)
    tiles, token_tiles = tl.cdiv(N, ROWS), tl.cdiv(M, TOKENS)
    first = tl.program_id(0) // (GROUP * tiles) * GROUP
    group = tl.minimum(token_tiles - first, GROUP)
    inner = tl.program_id(0) % (GROUP * tiles)
    row = inner // group * ROWS + tl.arange(0, ROWS)
    token = (first + inner % group) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, DEPTH)
    w_ptr += tl.where(row < N, row, 0).to(tl.int64)[:, None] * K + k[None, :]
    x_ptr += tl.where(token < M, token, 0).to(tl.int64)[None, :] * K + k[:, None]
    total, piece = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    left = part * 128
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        if RAGGED:
            exists = k < K - step
            w = tl.load(w_ptr + step, mask=exists[None, :], other=0.0)
            x = tl.load(x_ptr + step, mask=exists[:, None], other=0.0)
        else:
            w, x = tl.load(w_ptr + step), tl.load(x_ptr + step)
        piece = tl.dot(w, x, piece)
        left -= DEPTH
        if left == 0:
            total += piece
            piece = tl.zeros((ROWS, TOKENS), tl.float32)
            left = part * 128
    total += piece  # of a last slice that is shorter, or zero
    _store(total, bias_ptr, out_ptr, row[:, None], token[None, :], M, N, BIAS)


def choose_tile(num_rows: int, num_tokens: int) -> Tile:
    """The largest of which there are enough to keep a Hopper GPU busy: all have the same bits."""
    for most, tile in FEW_TILES:
        if num_tokens <= most:
            return tile
    for tile in (LARGE, MIDDLE):
        if num_tokens > tile.tokens // 2 and num_programs(tile, num_rows, num_tokens) >= MULTIPROCESSORS:
            return tile
    return SMALL


def num_programs(tile: Tile, num_rows: int, num_tokens: int) -> int:
    return -(-num_rows // tile.rows) * -(-num_tokens // tile.tokens)


@on_own_device
def bf16_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """BF16 x [M, K] times weight [N, K] transposed, plus bias [N], summed in float32 -> BF16 [M, N].

    `tile`: in place of the one that is chosen by M and N; it changes no bit.
    """
    (M, K), N = x.shape, len(weight)
    out = x.new_empty(M, N)
    if not M:
        return out
    tile, part = tile or choose_tile(N, M), -(-K // (SLICES * CUT))
    inputs = (x.contiguous(), weight, weight if bias is None else bias, out, M, N, K, part)
    sizes = {"ROWS": tile.rows, "TOKENS": tile.tokens, "DEPTH": tile.depth, "STAGES": tile.stages}
    options = {**sizes, "BIAS": bias is not None, "num_warps": tile.warps, **early(x)}
    if any(tile is few for _, few in FEW_TILES) or (tile.rows, tile.warps) == (16, SLICES):
        grid = (-(-N // tile.rows), -(-M // tile.tokens))
        few_tokens_kernel[grid](*inputs, SLICES=SLICES, RAGGED=K % (SLICES * CUT) != 0, **options)
    else:
        grid = (num_programs(tile, N, M),)
        many_tokens_kernel[grid](*inputs, GROUP=8, RAGGED=K % tile.depth != 0, **options)
    return out
