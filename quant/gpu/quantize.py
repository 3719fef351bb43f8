"""Activation quantizers: one pass over x, a program for every few rows."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device
from .early import await_inputs, early
from .floats import (
    FLOAT_MAX,
    LEAST_SCALE,
    NVFP4_RANGE,
    SIXTH,
    e2m1_code,
    e2m1_value,
    pack_codes,
    quotient,
    scale_offset,
)

ScaleLayout = Literal["linear", "128x4", "8x4"]
TILE_ROWS = {"linear": 0, "128x4": 128, "8x4": 8}

NONE, ONE, EACH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # static scales: none, one for all, one a row


@triton.jit
def load_rows(x_ptr, rows, num_rows, K, BLOCK_K: tl.constexpr, REPEAT: tl.constexpr):
    """Float32 [ROWS, BLOCK_K], every row of x [num_rows / REPEAT, K] REPEAT times; zeros outside."""
    cols = tl.arange(0, BLOCK_K)
    mask = (rows < num_rows)[:, None] & (cols < K)[None, :]
    source = (rows // REPEAT).to(tl.int64)[:, None] * K
    return tl.load(x_ptr + source + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _static_scale(static_ptr, rows, num_rows, STATIC: tl.constexpr):
    """Float32 [ROWS]: the one of all, or each row's own."""
    if STATIC == ONE:
        return tl.load(static_ptr) + tl.zeros(rows.shape, tl.float32)
    return tl.load(static_ptr + rows, mask=rows < num_rows, other=1.0)


@triton.jit
def _nvfp4_rows(x, rows, static_ptr, num_rows, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, STATIC: tl.constexpr):
    """Codes int32 [ROWS, BLOCK_K / 16, 16], block scales E4M3 [ROWS, BLOCK_K / 16], decode scales [ROWS]."""
    blocks = tl.reshape(x, (ROWS, BLOCK_K // 16, 16))
    block_amax = tl.max(tl.abs(blocks), axis=2)
    if STATIC:
        static = _static_scale(static_ptr, rows, num_rows, STATIC)
        encode = tl.div_rn(1.0 + static * 0, static)
    else:
        amax = tl.max(block_amax, axis=1)
        encode = tl.where(amax > 0, tl.minimum(tl.div_rn(NVFP4_RANGE + amax * 0, amax), FLOAT_MAX), FLOAT_MAX)
    decode = tl.div_rn(1.0 + encode * 0, encode)
    scale = tl.minimum(block_amax * (encode * SIXTH)[:, None], 448.0).to(tl.float8e4nv)
    divisor = scale.to(tl.float32) * decode[:, None]
    factor = tl.minimum(tl.div_rn(1.0 + divisor * 0, divisor), FLOAT_MAX)
    factor = tl.where(block_amax == 0, 0.0, factor)
    return e2m1_code(blocks * factor[:, :, None], STATIC != NONE), scale, decode


@triton.jit
def write_nvfp4(
    x,
    rows,
    static_ptr,
    codes_ptr,
    scales_ptr,
    token_ptr,
    num_rows,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Rows of float32 x [ROWS, BLOCK_K], zero beyond K: their codes, block scales and (not STATIC) decode scales."""
    inside = rows < num_rows
    codes, scale, decode = _nvfp4_rows(x, rows, static_ptr, num_rows, ROWS, BLOCK_K, STATIC)
    if not STATIC:
        tl.store(token_ptr + rows, decode, mask=inside)
    words = pack_codes(tl.reshape(codes, (ROWS, BLOCK_K)), ROWS, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 8)
    tl.store(
        codes_ptr + rows.to(tl.int64)[:, None] * (K // 8) + word[None, :],
        words,
        mask=inside[:, None] & (word < K // 8)[None, :],
    )
    block = tl.arange(0, BLOCK_K // 16)
    offset = scale_offset(rows.to(tl.int64)[:, None], block[None, :], K // 16, LAYOUT)
    tl.store(scales_ptr + offset, scale.to(tl.uint8, bitcast=True), mask=inside[:, None] & (block < K // 16)[None, :])


@triton.jit
def _nvfp4_kernel(
    x_ptr,
    static_ptr,
    codes_ptr,
    scales_ptr,
    token_ptr,
    num_rows,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAYOUT: tl.constexpr,
    STATIC: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = load_rows(x_ptr, rows, num_rows, K, BLOCK_K, 1)
    write_nvfp4(x, rows, static_ptr, codes_ptr, scales_ptr, token_ptr, num_rows, K, ROWS, BLOCK_K, LAYOUT, STATIC)


@triton.jit
def _nvfp4_products_kernel(
    x_ptr,
    static_ptr,
    products_ptr,
    token_ptr,
    num_rows,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATIC: tl.constexpr,
    REPEAT: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = load_rows(x_ptr, rows, num_rows, K, BLOCK_K, REPEAT)
    codes, scale, decode = _nvfp4_rows(x, rows, static_ptr, num_rows, ROWS, BLOCK_K, STATIC)
    if not STATIC:
        tl.store(token_ptr + rows, decode, mask=rows < num_rows)
    products = tl.reshape(e2m1_value(codes) * scale.to(tl.float32)[:, :, None], (ROWS, BLOCK_K)).to(tl.bfloat16)
    cols = tl.arange(0, BLOCK_K)
    mask = (rows < num_rows)[:, None] & (cols < K)[None, :]
    tl.store(products_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], products, mask=mask)


@on_own_device
def quantize_nvfp4(
    x: Tensor, input_scale: Tensor | None = None, layout: ScaleLayout = "linear"
) -> tuple[Tensor, Tensor, Tensor]:
    """BF16 x [M, K] -> codes uint8 [M, K / 2], block scales E4M3 (in `layout`), decode scale.

    Without `input_scale` (static, float32 scalar) every row has its own decode scale, float32 [M]. FlashInfer's exact
    recipe: bit-equal to `numerics.quantize_nvfp4_activation` for finite x; E2M1 has no NaN to pass one on.
    """
    num_rows, K = x.shape
    codes = torch.empty(num_rows, K // 2, dtype=torch.uint8, device=x.device)
    tile = TILE_ROWS[layout]
    if tile:  # what pads is zero
        shape = -(-num_rows // tile) * tile, -(-(K // 16) // 4) * 4
        scales = torch.zeros(*shape, dtype=torch.uint8, device=x.device)
    else:
        scales = torch.empty(num_rows, K // 16, dtype=torch.uint8, device=x.device)
    token = torch.empty(num_rows, device=x.device) if input_scale is None else input_scale
    rows, block_k, warps = row_tiles(K, 1024)
    if num_rows:
        _nvfp4_kernel[(-(-num_rows // rows),)](
            x,
            token,
            codes.view(torch.int32),
            scales,
            token,
            num_rows,
            K,
            ROWS=rows,
            BLOCK_K=block_k,
            LAYOUT=tile,
            STATIC=_mode(input_scale),
            num_warps=warps,
            **early(x),
        )
    return codes, scales.view(torch.float8_e4m3fn), token


@on_own_device
def nvfp4_products(x: Tensor, input_scale: Tensor | None = None, repeat: int = 1) -> tuple[Tensor, Tensor]:
    """BF16 x [M, K] -> E2M1 values times block scales, exact in BF16 [M * repeat, K]; float32 decode scales.

    What `quantize_nvfp4` would write, decoded, without the way through four bits. `input_scale` is for all, or float32
    [M * repeat], one for every repetition of every row; without it there is a scale a row.
    """
    num_rows, K = len(x) * repeat, x.shape[1]
    products = x.new_empty(num_rows, K)
    token = torch.empty(num_rows, device=x.device) if input_scale is None else input_scale
    rows, block_k, warps = row_tiles(K, 1024)
    if num_rows:
        _nvfp4_products_kernel[(-(-num_rows // rows),)](
            x,
            token,
            products,
            token,
            num_rows,
            K,
            ROWS=rows,
            BLOCK_K=block_k,
            STATIC=_mode(input_scale),
            REPEAT=repeat,
            num_warps=warps,
            **early(x),
        )
    return products, token


@triton.jit
def fp8_scale(amax):
    """float32 amax of some rows -> their decode scales; 1 for a row of zeros."""
    scale = tl.div_rn(amax, 448.0 + amax * 0)
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def fp8_codes(x, scale):
    """float32 x [ROWS, COLS], decode scales [ROWS] or [1] -> E4M3 codes of x / scale, rounded once."""
    if tl.min(scale, axis=0) >= LEAST_SCALE:
        values = quotient(x, scale[:, None], tl.div_rn(1.0 + scale * 0, scale)[:, None])
    else:
        values = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    return tl.clamp(values, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def write_fp8(
    x,
    rows,
    static_ptr,
    codes_ptr,
    token_ptr,
    num_rows,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Rows of float32 x [ROWS, BLOCK_K], zero beyond K: their codes and (not STATIC) decode scales."""
    cols = tl.arange(0, BLOCK_K)
    inside = rows < num_rows
    if STATIC:
        scale = _static_scale(static_ptr, rows, num_rows, STATIC)
    else:
        scale = fp8_scale(tl.max(tl.abs(x), axis=1))
        tl.store(token_ptr + rows, scale, mask=inside)
    offset = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(codes_ptr + offset, fp8_codes(x, scale), mask=inside[:, None] & (cols < K)[None, :])


@triton.jit
def _fp8_kernel(
    x_ptr,
    static_ptr,
    codes_ptr,
    token_ptr,
    num_rows,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATIC: tl.constexpr,
    REPEAT: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = load_rows(x_ptr, rows, num_rows, K, BLOCK_K, REPEAT)
    write_fp8(x, rows, static_ptr, codes_ptr, token_ptr, num_rows, K, ROWS, BLOCK_K, STATIC)


@on_own_device
def quantize_fp8(x: Tensor, input_scale: Tensor | None = None, repeat: int = 1) -> tuple[Tensor, Tensor]:
    """BF16 x [M, K] -> E4M3 codes [M * repeat, K], decode scales (float32 [M * repeat], or the static one).

    Bit-equal to `numerics.quantize_fp8_activation`. `input_scale` is for all, or one for every repetition of every row.
    """
    num_rows, K = len(x) * repeat, x.shape[1]
    codes = torch.empty(num_rows, K, dtype=torch.float8_e4m3fn, device=x.device)
    token = torch.empty(num_rows, device=x.device) if input_scale is None else input_scale
    rows, block_k, warps = row_tiles(K, 512)
    if num_rows:
        _fp8_kernel[(-(-num_rows // rows),)](
            x,
            token,
            codes,
            token,
            num_rows,
            K,
            ROWS=rows,
            BLOCK_K=block_k,
            STATIC=_mode(input_scale),
            REPEAT=repeat,
            num_warps=warps,
            **early(x),
        )
    return codes, token


def _mode(input_scale: Tensor | None) -> int:
    if input_scale is None:
        return NONE.value
    return ONE.value if input_scale.numel() == 1 else EACH.value


def row_tiles(K: int, thread_tile: int) -> tuple[int, int, int]:
    """Rows a program, columns rounded up to a power of two, warps: 16 elements a thread or more."""
    block_k = max(16, _power_of_two(K))
    rows = max(1, 2048 // block_k)
    return rows, block_k, min(16, max(1, rows * block_k // thread_tile))


def _power_of_two(count: int) -> int:
    """The next one."""
    return 1 << (count - 1).bit_length()
