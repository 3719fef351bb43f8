"""x W^T of FP8 codes for tens to some hundreds of tokens, through FP8's large matrix instruction.

That instruction keeps some 14 bits of a sum, so every 128 columns its sums move into float32, as in `torch._scaled_mm`.
K may be cut into parts, a program each. The last program of a tile to end adds them, in their order: who that is
changes nothing.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import on_own_device
from .early import await_inputs, early

EXACT = tl.constexpr(128)  # columns that are summed in the matrix units


class MiddleTile(NamedTuple):
    """Rows of the weight, tokens, columns of a step, steps loaded ahead; parts of K; warps."""

    rows: int
    tokens: int
    depth: int
    stages: int
    parts: int = 1
    warps: int = 4


# Measured on an H100, beside `torch._scaled_mm`, whose bits all of them gave: benchmarks/NOTES.md.
NARROW = MiddleTile(64, 32, 128, 8)
SQUARE, DEEP_SQUARE = MiddleTile(64, 64, 128, 6), MiddleTile(64, 64, 128, 8)
WIDE, DEEP_WIDE = MiddleTile(64, 128, 128, 6), MiddleTile(64, 128, 128, 8)
HALVED = tuple(tile._replace(parts=2) for tile in (NARROW, SQUARE, DEEP_SQUARE))
MIDDLE_TILES = (NARROW, SQUARE, DEEP_SQUARE, WIDE, DEEP_WIDE, *HALVED)
MOST, LEAST_COLS, LONG = 512, 768, 8192
MULTIPROCESSORS = 132


def middle_tile(num_rows: int, cols: int, tokens: int) -> MiddleTile | None:
    """What multiplies by a weight [num_rows, cols]; None where a library does it better.

    Too few programs for half of a Hopper GPU: K is halved. Too many small ones: larger tiles, or none.
    """
    if tokens > MOST or cols <= LEAST_COLS:
        return None
    tile = NARROW if tokens <= NARROW.tokens else DEEP_SQUARE if cols >= LONG else SQUARE
    if tokens > tile.tokens and _programs(tile, num_rows, tokens) > 1.5 * MULTIPROCESSORS:
        tile = DEEP_WIDE if cols >= LONG else WIDE
        if _programs(tile, num_rows, tokens) > MULTIPROCESSORS:
            return None
    return tile._replace(parts=2) if 2 * _programs(tile, num_rows, tokens) <= MULTIPROCESSORS else tile


def _programs(tile: MiddleTile, num_rows: int, tokens: int) -> int:
    return -(-num_rows // tile.rows) * -(-tokens // tile.tokens)


@triton.jit(do_not_specialize=["M", "steps"])
def middle_tokens_kernel(
    x,
    token_scale_ptr,
    w,
    row_scale_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    count_ptr,
    M,
    N,
    steps,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    EACH: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Codes x [M, K], w [N, K], as descriptors -> BF16 [M, N]; a part is `steps` times DEPTH columns."""
    await_inputs(EARLY)
    token_tiles, tile = tl.cdiv(M, TOKENS), tl.program_id(0)
    first_row, first_token = tile // token_tiles * ROWS, tile % token_tiles * TOKENS
    row, token = first_row + tl.arange(0, ROWS), first_token + tl.arange(0, TOKENS)
    row_scale = tl.load(row_scale_ptr + row, mask=row < N, other=0.0)[:, None]
    if EACH:
        token_scale = tl.load(token_scale_ptr + token, mask=token < M, other=0.0)[None, :]
    else:
        token_scale = tl.load(token_scale_ptr)
    start = tl.program_id(1) * steps * DEPTH
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        at = start + step * DEPTH
        codes = x.load([first_token, at])
        total = tl.dot(w.load([first_row, at]), codes.T, total, max_num_imprecise_acc=EXACT)
    at = token.to(tl.int64)[None, :] * N + row[:, None]
    inside = (row < N)[:, None] & (token < M)[None, :]
    if PARTS == 1:
        _store(total, row_scale, token_scale, bias_ptr, out_ptr + at, row, N, inside, BIAS)
    else:
        place = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        part_ptr += tile.to(tl.int64) * (PARTS * ROWS * TOKENS) + place
        tl.store(part_ptr + tl.program_id(1) * (ROWS * TOKENS), total)
        tl.debug_barrier()
        ticket = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
        if ticket == PARTS - 1:
            tl.debug_barrier()
            total = tl.load(part_ptr, cache_modifier=".cg")
            for part in tl.static_range(1, PARTS):
                total += tl.load(part_ptr + part * (ROWS * TOKENS), cache_modifier=".cg")
            _store(total, row_scale, token_scale, bias_ptr, out_ptr + at, row, N, inside, BIAS)
            tl.store(count_ptr + tile, 0)


@triton.jit
def _store(total, row_scale, token_scale, bias_ptr, out_ptr, row, N, inside, BIAS: tl.constexpr):
    """Row and token scales and the bias in float32, then one rounding."""
    total = total * row_scale * token_scale
    if BIAS:
        total += tl.load(bias_ptr + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr, total.to(tl.bfloat16), mask=inside)


@cache
def counters(device: torch.device, weight: int, tiles: int) -> Tensor:
    """Zeros, int32 [tiles], that a kernel leaves as it found them: of the weight at this address, by which an engine
    multiplies once at a time, whatever other engines and streams are at. A product in parts must have run once before
    it is captured in a graph, as for Triton's compiler."""
    return torch.zeros(tiles, dtype=torch.int32, device=device)


@on_own_device
def middle_tokens(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    num_rows: int,
    tile: MiddleTile,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """E4M3 codes [M, K] and weight [at least num_rows, K], row-major, K a multiple of 16 -> BF16 [M, num_rows], in
    `out` where it is given.

    Decode scales: `scale` float32 [M], or one for all, `row_scale` float32, one a row. `bias` [num_rows].
    """
    M, K = codes.shape
    out = torch.empty(M, num_rows, dtype=torch.bfloat16, device=codes.device) if out is None else out
    assert out.is_contiguous()
    tiles = -(-num_rows // tile.rows) * -(-M // tile.tokens)
    parts, count = out, out
    if tile.parts > 1:
        parts = torch.empty(tiles * tile.parts, tile.rows * tile.tokens, dtype=torch.float32, device=codes.device)
        count = counters(codes.device, weight.data_ptr(), tiles)
    if M:
        middle_tokens_kernel[(tiles, tile.parts)](
            TensorDescriptor.from_tensor(codes.contiguous(), [tile.tokens, tile.depth]), scale,
            TensorDescriptor.from_tensor(weight, [tile.rows, tile.depth]), row_scale,
            scale if bias is None else bias, out, parts, count, M, num_rows, -(-K // (tile.parts * tile.depth)),
            PARTS=tile.parts, ROWS=tile.rows, TOKENS=tile.tokens, DEPTH=tile.depth, STAGES=tile.stages,
            EACH=scale.numel() == M and M > 1, BIAS=bias is not None, num_warps=tile.warps, **early(codes),
        )  # fmt: skip
    return out
