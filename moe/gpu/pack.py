"""Stored NVFP4 -> what the grouped products read: a whole stack of experts in one launch."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...quant.gpu.device import on_own_device

ROWS = 4  # of a program


@triton.jit
def _code_pair(first, second):
    """Two E2M1 codes in a byte: sign0 sign1 mag1[3] mag0[3]."""
    return ((first >> 3) << 7) | ((second >> 3) << 6) | ((second & 7) << 3) | (first & 7)


@triton.jit
def pack_nvfp4_kernel(
    codes_ptr,
    scales_ptr,
    weight_ptr,
    block_scale_ptr,
    all_rows,
    num_rows,
    K,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A step of 128 k is 64 bytes of codes; the byte pair b of the result comes of the bytes b and 32 + b."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word, group = tl.arange(0, WORDS), tl.arange(0, GROUPS)
    inside = (row < all_rows)[:, None] & (word < K // 4)[None, :]
    step, byte = word // 32, word % 32
    source = codes_ptr + row[:, None] * (K // 2) + (step * 64 + byte)[None, :]
    scale = scales_ptr + row[:, None] * (K // 16) + (step * 8 + byte // 8)[None, :]
    low, high = tl.load(source, mask=inside, other=0), tl.load(source + 32, mask=inside, other=0)
    # a scale of zero is E4M3's, not UE5M3's: its codes become zero instead
    low = tl.where((tl.load(scale, mask=inside, other=0) & 0x7F) == 0, 0, low).to(tl.int32)
    high = tl.where((tl.load(scale + 4, mask=inside, other=0) & 0x7F) == 0, 0, high).to(tl.int32)
    pair = _code_pair(low & 15, high & 15) | (_code_pair(low >> 4, high >> 4) << 8)
    tl.store(weight_ptr + row[:, None] * (K // 4) + word[None, :], pair.to(tl.int16), mask=inside)

    inside = (row < all_rows)[:, None] & (group < K // 16)[None, :]
    scales = tl.load(scales_ptr + row[:, None] * (K // 16) + group[None, :], mask=inside, other=0)
    value = tl.maximum(scales.to(tl.float8e4nv, bitcast=True).to(tl.float32), 0.001953125)  # 2**-9
    bits = (value.to(tl.int32, bitcast=True) >> 20) - ((127 - 12) << 3)
    unit, own = row // num_rows, row % num_rows
    place = (unit[:, None] * (K // 64) + (group // 4)[None, :]) * num_rows + own[:, None]
    tl.store(block_scale_ptr + place * 4 + (group % 4)[None, :], bits.to(tl.uint8), mask=inside)


@on_own_device
def pack_nvfp4(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [..., N, K / 2], E4M3 [..., N, K / 16] -> uint8 [..., N, K / 2], uint8 [..., K / 128, 2, N, 4]."""
    *lead, num_rows, cols = codes.shape
    codes, scales, K = codes.contiguous(), scales.contiguous().view(torch.uint8), 2 * cols
    weight = torch.empty_like(codes)
    block_scale = codes.new_empty(*lead, K // 128, 2, num_rows, 4)
    all_rows = codes.numel() // cols
    pack_nvfp4_kernel[(-(-all_rows // ROWS),)](
        codes, scales, weight.view(torch.int16), block_scale, all_rows, num_rows, K,
        ROWS=ROWS, WORDS=triton.next_power_of_2(K // 4), GROUPS=triton.next_power_of_2(K // 16), num_warps=4,
    )  # fmt: skip
    return weight, block_scale
