"""Residual, layer norm, modulation and FP8 codes in one launch.

    h = x + gate * y;  out = layer_norm(h) * (1 + scale) + shift

Float32 throughout; h and out are rounded to BF16 once each (torch, operator by operator, rounds out four times and the
sum twice). Codes are those of the rounded out.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....quant.gpu.device import on_own_device
from ....quant.gpu.quantize import write_fp8
from .activations import Activations
from .streams import Streams, find_row


@triton.jit
def _load(ptr, offset, cols, K):
    """float32 [1, BLOCK_K] from one row; zeros beyond K."""
    return tl.load(ptr + offset + cols, mask=cols < K, other=0.0).to(tl.float32)


@triton.jit
def _modulate_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    codes_ptr,
    token_ptr,
    batch,
    text,
    image,
    num_rows,
    K,
    gate_stride,
    stride,
    share,
    eps,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program a row. ADD: x becomes h; NORM: there is an out; KEEP: as BF16; QUANTIZE: as FP8."""
    row, cols = tl.program_id(0), tl.arange(0, BLOCK_K)[None, :]
    stream, sample, _ = find_row(row, batch, text, image)
    table_row = (stream * batch + sample).to(tl.int64)
    offset = row.to(tl.int64) * K
    x = _load(x_ptr, offset, cols, K)
    if ADD:
        gate = _load(gate_ptr, table_row * gate_stride, cols, K)
        h = (x + gate * _load(y_ptr, offset, cols, K)).to(tl.bfloat16)
        tl.store(x_ptr + offset + cols, h, mask=cols < K)
        x = h.to(tl.float32)
    if NORM:
        mean = tl.sum(x, axis=1) * share
        centered = tl.where(cols < K, x - mean[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centered * centered, axis=1) * share + eps)
        scale = _load(scale_ptr, table_row * stride, cols, K)
        shift = _load(shift_ptr, table_row * stride, cols, K)
        out = (centered * inverse[:, None] * (1.0 + scale) + shift).to(tl.bfloat16)
        if KEEP:
            tl.store(out_ptr + offset + cols, out, mask=cols < K)
        if QUANTIZE:
            rows = row + tl.arange(0, 1)
            write_fp8(out.to(tl.float32), rows, token_ptr, codes_ptr, token_ptr, num_rows, K, 1, BLOCK_K, 0)


@on_own_device
def add_gated(x: Tensor, y: Tensor, gate: Tensor, streams: Streams) -> None:
    """x += gate * y, in place: BF16 x, y [num_rows, K]; gate [num_streams, batch, K], rows of any stride."""
    _launch(x, streams, y=y, gate=gate)


@on_own_device
def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    streams: Streams,
    eps: float,
    residual: tuple[Tensor, Tensor] | None = None,
    *,
    keep: bool = True,
    quantize: bool = False,
) -> Activations:
    """BF16 x [num_rows, K], with `residual` (y, gate) added in place first -> layer_norm(x) * (1 + scale) + shift.

    scale, shift, gate: BF16 [num_streams, batch, K], rows of any stride, scale and shift of the same. `keep`: as BF16;
    `quantize`: as E4M3 codes with a decode scale a row.
    """
    out = torch.empty_like(x) if keep else None
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn) if quantize else None
    token = torch.empty(len(x), device=x.device) if quantize else None
    y, gate = residual or (None, None)
    _launch(x, streams, y=y, gate=gate, scale=scale, shift=shift, eps=eps, out=out, codes=codes, token=token)
    return Activations(out, codes, token)


def _launch(
    x: Tensor,
    streams: Streams,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
    codes: Tensor | None = None,
    token: Tensor | None = None,
) -> None:
    num_rows, K = x.shape
    assert x.is_contiguous()
    assert num_rows == streams.num_rows
    assert scale is None or shift is None or scale.stride() == shift.stride()
    block_k = max(16, triton.next_power_of_2(K))
    _modulate_kernel[(num_rows,)](
        x, x if y is None else y, x if gate is None else gate, x if scale is None else scale,
        x if shift is None else shift, x if out is None else out, x if codes is None else codes,
        x if token is None else token, streams.batch, streams.text, streams.image, num_rows, K,
        0 if gate is None else _row_stride(gate), 0 if scale is None else _row_stride(scale), 1 / K, eps,
        ADD=y is not None, NORM=scale is not None, KEEP=out is not None, QUANTIZE=codes is not None,
        BLOCK_K=block_k, num_warps=min(8, max(1, block_k // 512)),
    )  # fmt: skip


def _row_stride(table: Tensor) -> int:
    """Of a modulation [num_streams, batch, K]: streams and samples are rows of one table."""
    assert table.stride(-1) == 1
    assert len(table) == 1 or table.stride(0) == table.stride(1) * table.shape[1]
    return table.stride(1)
