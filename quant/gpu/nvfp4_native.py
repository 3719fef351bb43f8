"""x W^T of NVFP4 times NVFP4 on tensor cores that multiply it themselves (sm100, sm103, sm120), from stored tensors.

It has compiled for these GPUs and computed in the interpreter, with exact products; it has never run on one of them,
and no kernel of the registry uses it.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device
from .floats import e2m1_value

# The scaled product of sm100 takes 128 tokens at the least; sm120 keeps sums in registers.
TILE = {"TOKENS": 128, "ROWS": 128, "DEPTH": 256, "STAGES": 3, "num_warps": 4}
SM120_TILE = TILE | {"DEPTH": 128, "num_warps": 8}


@triton.jit
def native_product(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    row_scale_ptr,
    token_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Codes uint8 x [M, K / 2], w [N, K / 2], block scales E4M3 [.., K / 16], linear -> BF16 [M, N]."""
    token, row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        x, x_scale = _load(x_ptr, x_scale_ptr, token, M, step, K, DEPTH)
        w, w_scale = _load(w_ptr, w_scale_ptr, row, N, step, K, DEPTH)
        if NATIVE:
            total = tl.dot_scaled(x, x_scale, "e2m1", tl.trans(w), w_scale, "e2m1", total)
        else:
            total = tl.dot(_products(x, x_scale), tl.trans(_products(w, w_scale)), total)
    total = total * tl.load(row_scale_ptr + row, mask=row < N, other=0.0)[None, :]
    total = total * tl.load(token_scale_ptr + token, mask=token < M, other=0.0)[:, None]
    target = out_ptr + token.to(tl.int64)[:, None] * N + row[None, :]
    tl.store(target, total.to(tl.bfloat16), mask=(token < M)[:, None] & (row < N)[None, :])


@triton.jit
def _load(codes_ptr, scales_ptr, row, num_rows, step, K, DEPTH: tl.constexpr):
    """A step of some rows: codes [R, DEPTH / 2] and block scales [R, DEPTH / 16]; what is beyond is zero."""
    start, inside = row.to(tl.int64)[:, None], (row < num_rows)[:, None]
    byte, group = step // 2 + tl.arange(0, DEPTH // 2)[None, :], step // 16 + tl.arange(0, DEPTH // 16)[None, :]
    codes = tl.load(codes_ptr + start * (K // 2) + byte, mask=inside & (byte < K // 2), other=0)
    return codes, tl.load(scales_ptr + start * (K // 16) + group, mask=inside & (group < K // 16), other=0.0)


@triton.jit
def _products(codes, scales):
    """Codes uint8 [R, D / 2] times block scales [R, D / 16] -> BF16 [R, D], exact."""
    R: tl.constexpr = codes.shape[0]
    D: tl.constexpr = codes.shape[1] * 2
    both = codes.to(tl.int32)
    values = e2m1_value(tl.join(both & 15, both >> 4).reshape(R, D // 16, 16))
    return (values * scales.to(tl.float32)[:, :, None]).reshape(R, D).to(tl.bfloat16)


@on_own_device
def native_matmul(
    x: Tensor, x_scale: Tensor, token_scale: Tensor, w: Tensor, w_scale: Tensor, row_scale: Tensor, out: Tensor
) -> None:
    """Quantized x [M, K] (`quantize_nvfp4`) times a stored weight [N, K], row scales [N] -> out BF16 [M, N]."""
    M, N = out.shape
    tile = SM120_TILE if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (12, 0) else TILE
    native_product[(-(-M // tile["TOKENS"]), -(-N // tile["ROWS"]))](
        x, x_scale, w, w_scale, row_scale, token_scale, out, M, N, 2 * x.shape[1], **tile, NATIVE=x.is_cuda
    )
