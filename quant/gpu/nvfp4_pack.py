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

ROWS = 32  # of a program, for one step
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
    """A 16-bit half of a word takes one nibble of four bytes; see `nvfp4_widen.py` for its bits."""
    row, step = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    unit, own = row // num_rows, row % num_rows
    half, exists = tl.arange(0, 32), (row < all_rows)[:, None]
    c, q, nibble = half >> 3, (half >> 1) & 3, (half & 1) * 4  # place 16 c + 4 q + i is k = 16 q + 4 c + i
    byte, group = step * 64 + q * 8 + c * 2, step * 8 + q
    start = row.to(tl.int64)[:, None]
    first = _codes(codes_ptr, scales_ptr, start, byte, group, nibble, K, exists)
    second = _codes(codes_ptr, scales_ptr, start, byte + 32, group + 4, nibble, K, exists)
    a, b, c, d = first & 15, first >> 4, second & 15, second >> 4
    bits = ((a >> 3) << 15) | ((d >> 3) << 14) | ((b >> 3) << 12) | ((c >> 3) << 9)
    bits |= ((a & 7) << 6) | ((b & 7) << 3) | (c & 7) | ((d & 4) << 11) | ((d & 3) << 10)
    place = ((unit * steps + step).to(tl.int64) * num_rows + own)[:, None]
    tl.store(weight_ptr + place * 32 + half[None, :], bits.to(tl.int16), mask=exists)

    group = tl.arange(0, 8)[None, :]
    inside = exists & (step * 8 + group < K // 16)
    scales = tl.load(scales_ptr + start * (K // 16) + step * 8 + group, mask=inside, other=0)
    value = tl.maximum(scales.to(tl.float8e4nv, bitcast=True).to(tl.float32), E4M3_MIN)
    bits = tl.where(inside, (value.to(tl.int32, bitcast=True) >> 20) - UE5M3_BIAS, 0)
    place = ((unit * steps + step).to(tl.int64) * 2)[:, None] * num_rows + (group >> 2) * num_rows + own[:, None]
    tl.store(block_scale_ptr + place * 4 + (group & 3), bits.to(tl.uint8), mask=exists)


@triton.jit
def _codes(codes_ptr, scales_ptr, row, byte, group, nibble, K, exists):
    """Two codes of every row and half word, two apart along k: int32, the first in the low four bits.

    A scale of zero is E4M3's, not UE5M3's: its codes become zero instead.
    """
    inside = exists & (byte < K // 2)[None, :]
    at = codes_ptr + row * (K // 2) + byte[None, :]
    low, high = tl.load(at, mask=inside, other=0).to(tl.int32), tl.load(at + 1, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales_ptr + row * (K // 16) + group[None, :], mask=inside, other=0)
    shift = nibble[None, :]
    codes = ((low >> shift) & 15) | (((high >> shift) & 15) << 4)
    return tl.where((scale & 0x7F) == 0, 0, codes)


@on_own_device
def pack_nvfp4(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [..., N, K / 2], E4M3 [..., N, K / 16] -> uint8 [..., steps, N, 64], uint8 [..., steps, 2, N, 4]."""
    *lead, num_rows, cols = codes.shape
    steps = -(-cols // 64)
    codes, scales = codes.contiguous(), scales.contiguous().view(torch.uint8)
    weight = codes.new_empty(*lead, steps, num_rows, 64)
    block_scale = codes.new_empty(*lead, steps, 2, num_rows, 4)
    all_rows = codes.numel() // cols
    pack_kernel[(-(-all_rows // ROWS), steps)](
        codes, scales, weight.view(torch.int16), block_scale, all_rows, num_rows, 2 * cols, steps, ROWS=ROWS
    )
    return weight, block_scale
