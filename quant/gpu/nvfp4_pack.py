"""Stored NVFP4 -> what the dense product reads, in one launch: the bytes of `NVFP4Packer.prepare`."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device
from .floats import E4M3_MIN

ROWS = 64  # of a program, for one step
UE5M3_BIAS = tl.constexpr((127 - 12) << 3)


@triton.jit
def pack_kernel(
    codes_ptr,
    scales_ptr,
    weight_ptr,
    block_scale_ptr,
    all_rows,
    num_rows,
    K,
    steps,
    ROWS: tl.constexpr,
):
    """A word takes four codes of either half of a step, which lie side by side; see `nvfp4_widen.py` for its bits."""
    step, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    unit, own = row // num_rows, row % num_rows
    start, exists = row.to(tl.int64)[:, None], (row < all_rows)[:, None]
    group, quad = tl.arange(0, 8)[None, :], tl.arange(0, 32)[None, :]
    inside = exists & (step * 8 + group < K // 16)
    scales = tl.load(scales_ptr + start * (K // 16) + step * 8 + group, mask=inside, other=0)

    # quads of neighbours, 16 half + 4 q + c, are those of the places 16 c + 4 q of their half
    codes = tl.load(codes_ptr + start * (K // 4) + step * 32 + quad, mask=exists & (step * 32 + quad < K // 4), other=0)
    zero = tl.broadcast_to(((scales & 0x7F) == 0)[:, :, None], (ROWS, 8, 4)).reshape(ROWS, 32)
    codes = tl.where(zero, 0, codes)  # a scale of zero is E4M3's, not UE5M3's: its codes become zero instead
    first, second = tl.split(tl.permute(codes.to(tl.int32).reshape(ROWS, 2, 4, 4), (0, 3, 2, 1)))
    bits = _word(_pair(first), _pair(first >> 8), _pair(second), _pair(second >> 8)).reshape(ROWS, 16)
    place = ((unit * steps + step).to(tl.int64) * num_rows + own)[:, None]
    tl.store(weight_ptr + place * 16 + tl.arange(0, 16)[None, :], bits.to(tl.int32, bitcast=True), mask=exists)

    value = tl.maximum(scales.to(tl.float8e4nv, bitcast=True).to(tl.float32), E4M3_MIN)
    bits = tl.where(inside, (value.to(tl.int32, bitcast=True) >> 20) - UE5M3_BIAS, 0)
    place = ((unit * steps + step).to(tl.int64) * 2)[:, None] * num_rows + (group >> 2) * num_rows + own[:, None]
    tl.store(block_scale_ptr + place * 4 + (group & 3), bits.to(tl.uint8), mask=exists)


@triton.jit
def _pair(codes):
    """Two neighbours -> two BF16 numbers, uint32: the sign at 15, magnitude at 8 to 6, the second 16 bits higher."""
    codes = (codes.to(tl.uint32) & 0x0F) | ((codes.to(tl.uint32) & 0xF0) << 12)
    return ((codes & 0x00080008) << 12) | ((codes & 0x00070007) << 6)


@triton.jit
def _word(a, b, c, d):
    """Four pairs in a word, as `nvfp4_widen.py` draws it."""
    b, d_end = (b << 4) | (b >> 28), (d >> 2) & 0x00100010
    d = d & 0x81808180
    return a | b | (c >> 6) | (d << 6) | (d >> 26) | d_end


@on_own_device
def pack_nvfp4(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [..., N, K / 2], E4M3 [..., N, K / 16] -> uint8 [..., steps, N, 64], uint8 [..., steps, 2, N, 4]."""
    *lead, num_rows, cols = codes.shape
    steps = -(-cols // 64)
    codes, scales = codes.contiguous(), scales.contiguous().view(torch.uint8)
    weight = codes.new_empty(*lead, steps, num_rows, 64)
    block_scale = codes.new_empty(*lead, steps, 2, num_rows, 4)
    all_rows = codes.numel() // cols
    pack_kernel[(steps, -(-all_rows // ROWS))](
        codes.view(torch.int16), scales, weight.view(torch.int32), block_scale, all_rows, num_rows, 2 * cols, steps,
        ROWS=ROWS,
    )  # fmt: skip
    return weight, block_scale
