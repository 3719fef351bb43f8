"""x W^T with NVFP4 weights and BF16 activations (W4A16), or with activations that are exact products (W4A4's twin).

Up to FEW tokens: the weight's rows are the tall side of a tile, K is cut into equal slices, by the shape alone, and
every warp of a program sums one slice, step by step; then the slices are summed in order. A token's result depends on
no other token, nor on how many there are. Up to MIDDLE tokens it has the same bits from the large matrix instruction
(`nvfp4_middle.py`). Above, weights are decoded to BF16 once and multiplied as such: again independent of other tokens,
but summed in another order.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device
from .early import await_inputs, early, fetch
from .nvfp4_middle import middle_tokens
from .nvfp4_store import load_scales, store_scaled
from .nvfp4_widen import DEPTH, HALF, SCALES, first_half, real_order, second_half
from .nvfp4_words import in_word_order
from .slices import sum_in_order


class Tile(NamedTuple):
    """Rows of the weight and tokens of a program; depth along K and warps, where the slices do not say them."""

    rows: int
    tokens: int
    stages: int
    depth: int = 128
    warps: int = 0


# Tokens, at the most -> tile. Measured on an H100: benchmarks/NOTES.md. Above MIDDLE weights are decoded to BF16 first,
# above twice as many if a weight has LARGE numbers or more.
Tiles = tuple[tuple[int, Tile], ...]
Scales = tuple[Tensor, Tensor, Tensor]  # of rows, of tokens, and the bias; what is not there is not read
FEW_TILES = ((8, Tile(32, 8, 4)), (16, Tile(32, 16, 3)), (128, Tile(32, 32, 2)))
FEW = 16
MIDDLE, LARGE = 256, 1 << 25
SMALL_MIDDLE, MIDDLE_TILE = Tile(64, 32, 3, warps=4), Tile(64, 64, 3, warps=4)
TALL_MIDDLE, WIDE_MIDDLE = Tile(128, 64, 3, warps=4), Tile(128, 128, 3, warps=8)
MIDDLE_TILES = (SMALL_MIDDLE, MIDDLE_TILE, TALL_MIDDLE, WIDE_MIDDLE)
MULTIPROCESSORS = 132
MANY_TILES = (
    (512, Tile(128, 64, 4, depth=64, warps=4)),
    (1024, Tile(128, 128, 4, depth=64, warps=4)),
    (1 << 31, Tile(128, 256, 3, depth=64, warps=8)),
)


def middle_tile(num_rows: int, M: int) -> Tile | None:
    """The largest tile of which there are enough to keep a Hopper GPU busy; None where a slice a warp does it better.

    All sum alike, so that a weight's rows and the number of tokens may decide.
    """
    programs = {tile: -(-num_rows // tile.rows) * -(-M // tile.tokens) for tile in MIDDLE_TILES}
    if M > 64 and programs[WIDE_MIDDLE] >= (200 if M <= 256 else 120):
        return WIDE_MIDDLE
    if 32 < M <= 64 and programs[TALL_MIDDLE] >= 200:
        return TALL_MIDDLE
    if M > 32 and programs[MIDDLE_TILE] >= MULTIPROCESSORS:
        return MIDDLE_TILE
    return None if FEW_TILES[-1][0] >= M and programs[SMALL_MIDDLE] <= MULTIPROCESSORS else SMALL_MIDDLE


@triton.jit(do_not_specialize=["M", "steps"])
def _few_tokens(
    x_ptr,
    w_ptr,
    scale_ptr,
    row_scale_ptr,
    token_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    first_row,
    end_row,
    steps,
    SLICES: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x BF16 [M, K], w packed [steps, N, 64] -> columns first_row to end_row of BF16 [M, N]; a slice a warp."""
    row = first_row + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    rows, tokens = row[:, None], token[None, :]
    source, order = tl.where(row < end_row, row, first_row), real_order()
    part = steps // SLICES
    start = tl.arange(0, SLICES)[:, None, None] * part
    w_ptr += start.to(tl.int64) * (N * HALF) + source[None, :, None] * HALF
    scale_ptr += start.to(tl.int64) * (2 * SCALES * N)
    if EARLY:  # the first step of each slice
        fetch(w_ptr)
        fetch(
            scale_ptr + tl.arange(0, 2)[None, :, None] * (SCALES * N) + (first_row + tl.program_id(0) * ROWS) * SCALES
        )
    await_inputs(EARLY)
    row_scale, token_scale, bias = load_scales(
        row_scale_ptr, token_scale_ptr, bias_ptr, rows, tokens, M, end_row, SCALED, BIAS
    )
    w_ptr += tl.arange(0, HALF)[None, None, :]
    scale_ptr += source[None, :, None] * SCALES + tl.arange(0, SCALES)[None, None, :]
    x_ptr += token.to(tl.int64)[None, None, :] * K + start * DEPTH + order[None, :, None]
    inside = (token < M)[None, None, :]
    left = K - start * DEPTH - order[None, :, None]  # of x, where K is no multiple of a step
    total = tl.zeros((SLICES, ROWS, TOKENS), tl.float32)
    for step in tl.range(0, part, num_stages=STAGES):
        if RAGGED:
            x0 = tl.load(x_ptr + step * DEPTH, mask=inside & (left > step * DEPTH), other=0.0)
            x1 = tl.load(x_ptr + step * DEPTH + HALF, mask=inside & (left > step * DEPTH + HALF), other=0.0)
        else:
            x0 = tl.load(x_ptr + step * DEPTH, mask=inside, other=0.0)
            x1 = tl.load(x_ptr + step * DEPTH + HALF, mask=inside, other=0.0)
        w = tl.load(w_ptr)
        scales0, scales1 = tl.load(scale_ptr), tl.load(scale_ptr + SCALES * N)
        w_ptr += N * HALF
        scale_ptr += 2 * SCALES * N
        total = tl.dot(first_half(w, scales0, ASSEMBLY), x0, total)
        total = tl.dot(second_half(w, scales1, ASSEMBLY), x1, total)
    total = sum_in_order(total)
    store_scaled(total, row_scale, token_scale, bias, out_ptr, rows, tokens, M, N, end_row, SCALED, BIAS)


@triton.jit
def _decode(w_ptr, scale_ptr, out_ptr, N, K, first_row, end_row, ROWS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Rows of a packed weight -> BF16 [end_row - first_row, K]: codes times block scales, times 2**-8."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, step = first_row + place, tl.program_id(1)
    inside, order = row < end_row, real_order()
    w_ptr += step.to(tl.int64) * (N * HALF) + row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    w = tl.load(w_ptr, mask=inside[:, None], other=0)
    scale_ptr += step.to(tl.int64) * (2 * SCALES * N) + row[:, None] * SCALES + tl.arange(0, SCALES)[None, :]
    scales0 = tl.load(scale_ptr, mask=inside[:, None], other=0)
    scales1 = tl.load(scale_ptr + SCALES * N, mask=inside[:, None], other=0)
    col = step * DEPTH + order[None, :]
    out_ptr += place.to(tl.int64)[:, None] * K + col
    products = first_half(w[None], scales0[None], ASSEMBLY).reshape(ROWS, HALF)
    tl.store(out_ptr, products, mask=inside[:, None] & (col < K))
    products = second_half(w[None], scales1[None], ASSEMBLY).reshape(ROWS, HALF)
    tl.store(out_ptr + HALF, products, mask=inside[:, None] & (col + HALF < K))


@triton.jit(do_not_specialize=["M"])
def _many_tokens(
    x_ptr,
    w_ptr,
    row_scale_ptr,
    token_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    first_row,
    end_row,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """x BF16 [M, K] times decoded rows BF16 [end_row - first_row, K]; GROUP tiles of tokens share what the L2 holds."""
    tiles, token_tiles = tl.cdiv(end_row - first_row, ROWS), tl.cdiv(M, TOKENS)
    first = tl.program_id(0) // (GROUP * tiles) * GROUP
    group = tl.minimum(token_tiles - first, GROUP)
    inner = tl.program_id(0) % (GROUP * tiles)
    place = inner // group * ROWS + tl.arange(0, ROWS)
    token = (first + inner % group) * TOKENS + tl.arange(0, TOKENS)
    row, k = first_row + place, tl.arange(0, DEPTH)
    rows, tokens = row[None, :], token[:, None]
    row_scale, token_scale, bias = load_scales(
        row_scale_ptr, token_scale_ptr, bias_ptr, rows, tokens, M, end_row, SCALED, BIAS
    )
    source, x_row = tl.where(row < end_row, place, 0), tl.where(token < M, token, 0)
    w_ptr += source.to(tl.int64)[:, None] * K + k[None, :]
    x_ptr += x_row.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        if RAGGED:
            left = (k < K - step)[None, :]
            x, w = tl.load(x_ptr + step, mask=left, other=0.0), tl.load(w_ptr + step, mask=left, other=0.0)
        else:
            x, w = tl.load(x_ptr + step), tl.load(w_ptr + step)
        total = tl.dot(x, tl.trans(w), total)
    store_scaled(total, row_scale, token_scale, bias, out_ptr, rows, tokens, M, N, end_row, SCALED, BIAS)


def few_tile(num_rows: int, M: int) -> Tile:
    """Two to four programs of few tokens share a multiprocessor best if they load fewer steps ahead."""
    tile = _tile(FEW_TILES, M)
    shared = MULTIPROCESSORS < -(-num_rows // tile.rows) <= 4 * MULTIPROCESSORS
    return tile._replace(stages=3) if shared and tile.stages > 3 else tile


def num_slices(steps: int) -> int:
    """Parts that K is cut into: by the shape alone."""
    return next(slices for slices in (4, 2, 1) if steps % slices == 0)


@on_own_device
def nvfp4_matmul(
    x: Tensor,
    packed: Mapping[str, Tensor],
    out: Tensor,
    rows: slice,
    token_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    invariant: bool = False,
) -> None:
    """x BF16 [M, K] times rows of a packed weight -> these columns of out BF16 [M, N].

    `token_scale` float32 [M] or a scalar, `bias` [N]. `invariant`: one order of sums whatever M, which is slower for
    many tokens.
    """
    scales = packed["row_scale"], x if token_scale is None else token_scale, x if bias is None else bias
    scaled = 0 if token_scale is None else 1 if token_scale.ndim else 2
    M, N = len(x), out.shape[1]
    most = M if invariant else 2 * MIDDLE if N * x.shape[1] >= LARGE else MIDDLE
    few = M <= FEW or (most >= M and middle_tile(N, M) is None)
    launch = _launch_few if few else _launch_middle if most >= M else _launch_many
    launch(x, packed, scales, out, rows, {"SCALED": scaled, "BIAS": bias is not None})


def _launch_few(
    x: Tensor, packed: Mapping[str, Tensor], scales: Scales, out: Tensor, rows: slice, options: dict[str, int]
) -> None:
    (M, K), (steps, N, _) = x.shape, packed["weight"].shape
    tile, slices = few_tile(rows.stop - rows.start, M), num_slices(steps)
    _few_tokens[_grid(rows, M, tile)](
        x, packed["weight"], packed["block_scale"], *scales, out, M, N, K, rows.start, rows.stop, steps,
        ROWS=tile.rows, TOKENS=tile.tokens, STAGES=tile.stages, SLICES=slices, RAGGED=K % DEPTH.value != 0,
        ASSEMBLY=x.is_cuda, num_warps=slices, **options, **early(x),
    )  # fmt: skip


def _launch_middle(
    x: Tensor, packed: Mapping[str, Tensor], scales: Scales, out: Tensor, rows: slice, options: dict[str, int]
) -> None:
    M, (steps, N, _) = len(x), packed["weight"].shape
    tile = middle_tile(N, M) or SMALL_MIDDLE
    weight, block_scale = (packed[name].view(torch.int32) for name in ("weight", "block_scale"))
    middle_tokens[_grid(rows, M, tile)](
        in_word_order(x), weight, block_scale, *scales, out, M, N, rows.start, rows.stop, steps,
        ROWS=tile.rows, TOKENS=tile.tokens, STAGES=tile.stages, SLICES=num_slices(steps),
        ASSEMBLY=x.is_cuda, num_warps=tile.warps, **options,
    )  # fmt: skip


def _launch_many(
    x: Tensor, packed: Mapping[str, Tensor], scales: Scales, out: Tensor, rows: slice, options: dict[str, int]
) -> None:
    (M, K), (steps, N, _) = x.shape, packed["weight"].shape
    tile, size = _tile(MANY_TILES, M), rows.stop - rows.start
    decoded = x.new_empty(size, K)
    _decode[(-(-size // 64), steps)](
        packed["weight"], packed["block_scale"], decoded, N, K, rows.start, rows.stop,
        ROWS=64, ASSEMBLY=x.is_cuda, num_warps=4,
    )  # fmt: skip
    tiles = _grid(rows, M, tile)
    _many_tokens[(tiles[0] * tiles[1],)](
        x, decoded, *scales, out, M, N, K, rows.start, rows.stop,
        ROWS=tile.rows, TOKENS=tile.tokens, STAGES=tile.stages, DEPTH=tile.depth, RAGGED=K % tile.depth != 0,
        GROUP=8, num_warps=tile.warps, **options,
    )  # fmt: skip


def _tile(table: Tiles, M: int) -> Tile:
    return next(tile for most, tile in table if most >= M)


def _grid(rows: slice, M: int, tile: Tile) -> tuple[int, int]:
    return -(-(rows.stop - rows.start) // tile.rows), -(-M // tile.tokens)
