"""SwiGLU in one launch, with the codes of what comes out where a quantized product follows.

silu(gate) is rounded to BF16, then its product with up, as torch rounds them. The exponential is the GPU's: where
silu(gate) lies next to a boundary of BF16, the result differs from torch's by one step.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....quant.gpu.device import on_own_device
from ....quant.gpu.early import await_inputs, early
from ....quant.gpu.quantize import quantize_fp8, quantize_nvfp4, row_tiles, write_fp8, write_nvfp4

COLS = 2048  # of a program of `silu_and_mul`
MOST_COLS = 16384  # of a row that a program can hold; a longer one takes two launches, to the same bits


@triton.jit
def _load_gated(gate_up_ptr, rows, cols, num_rows, K):
    """silu(gate) * up of gate_up [num_rows, 2 K], as values of BF16 in float32; zeros outside."""
    mask = (rows < num_rows)[:, None] & (cols < K)[None, :]
    offset = rows.to(tl.int64)[:, None] * (2 * K) + cols[None, :]
    gate = tl.load(gate_up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offset + K, mask=mask, other=0.0).to(tl.float32)
    activated = tl.div_rn(gate, 1.0 + tl.exp(0.0 - gate)).to(tl.bfloat16).to(tl.float32)
    return (activated * up).to(tl.bfloat16).to(tl.float32)


@triton.jit
def _bf16_kernel(gate_up_ptr, out_ptr, num_rows, K, ROWS: tl.constexpr, COLS: tl.constexpr, EARLY: tl.constexpr):
    await_inputs(EARLY)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    x = _load_gated(gate_up_ptr, rows, cols, num_rows, K)
    offset = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(out_ptr + offset, x.to(tl.bfloat16), mask=(rows < num_rows)[:, None] & (cols < K)[None, :])


@triton.jit
def _fp8_kernel(
    gate_up_ptr,
    static_ptr,
    codes_ptr,
    token_ptr,
    num_rows,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATIC: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = _load_gated(gate_up_ptr, rows, tl.arange(0, BLOCK_K), num_rows, K)
    write_fp8(x, rows, static_ptr, codes_ptr, token_ptr, num_rows, K, ROWS, BLOCK_K, STATIC)


@triton.jit
def _nvfp4_kernel(
    gate_up_ptr,
    static_ptr,
    codes_ptr,
    scales_ptr,
    token_ptr,
    num_rows,
    K,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STATIC: tl.constexpr,
    EARLY: tl.constexpr,
):
    await_inputs(EARLY)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = _load_gated(gate_up_ptr, rows, tl.arange(0, BLOCK_K), num_rows, K)
    write_nvfp4(x, rows, static_ptr, codes_ptr, scales_ptr, token_ptr, num_rows, K, ROWS, BLOCK_K, 0, STATIC)


@on_own_device
def silu_and_mul(gate_up: Tensor) -> Tensor:
    """BF16 [M, 2 K], gate and up side by side -> silu(gate) * up, BF16 [M, K]."""
    gate_up, num_rows, K = _rows(gate_up)
    out = gate_up.new_empty(num_rows, K)
    rows, block_k, warps = row_tiles(min(K, COLS), 512)
    if num_rows:
        _bf16_kernel[(-(-num_rows // rows), -(-K // COLS))](
            gate_up, out, num_rows, K, ROWS=rows, COLS=block_k, num_warps=warps, **early(gate_up),
        )  # fmt: skip
    return out


@on_own_device
def silu_and_mul_quantize_fp8(gate_up: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """BF16 [M, 2 K] -> E4M3 codes [M, K] of `silu_and_mul`, decode scale (float32 [M], or the static scalar)."""
    gate_up, num_rows, K = _rows(gate_up)
    if K > MOST_COLS:
        return quantize_fp8(silu_and_mul(gate_up), input_scale)
    codes = torch.empty(num_rows, K, dtype=torch.float8_e4m3fn, device=gate_up.device)
    token = torch.empty(num_rows, device=gate_up.device) if input_scale is None else input_scale
    rows, block_k, warps = row_tiles(K, 512)
    if num_rows:
        _fp8_kernel[(-(-num_rows // rows),)](
            gate_up, token, codes, token, num_rows, K,
            ROWS=rows, BLOCK_K=block_k, STATIC=input_scale is not None, num_warps=warps, **early(gate_up),
        )  # fmt: skip
    return codes, token


@on_own_device
def silu_and_mul_quantize_nvfp4(gate_up: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """BF16 [M, 2 K] -> what `quantize_nvfp4` returns for `silu_and_mul`, block scales linear."""
    gate_up, num_rows, K = _rows(gate_up)
    if K > MOST_COLS:
        return quantize_nvfp4(silu_and_mul(gate_up), input_scale)
    codes = torch.empty(num_rows, K // 2, dtype=torch.uint8, device=gate_up.device)
    scales = torch.empty(num_rows, K // 16, dtype=torch.uint8, device=gate_up.device)
    token = torch.empty(num_rows, device=gate_up.device) if input_scale is None else input_scale
    rows, block_k, warps = row_tiles(K, 1024)
    if num_rows:
        _nvfp4_kernel[(-(-num_rows // rows),)](
            gate_up, token, codes.view(torch.int32), scales, token, num_rows, K,
            ROWS=rows, BLOCK_K=block_k, STATIC=input_scale is not None, num_warps=warps, **early(gate_up),
        )  # fmt: skip
    return codes, scales.view(torch.float8_e4m3fn), token


def _rows(gate_up: Tensor) -> tuple[Tensor, int, int]:
    """Contiguous, its rows, and half its columns."""
    assert gate_up.dtype == torch.bfloat16
    assert gate_up.shape[1] % 2 == 0
    return gate_up.contiguous(), gate_up.shape[0], gate_up.shape[1] // 2
