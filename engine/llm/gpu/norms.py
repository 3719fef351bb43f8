"""RMS norms in one launch: alone, after the residual sum, and with the FP8 codes of what comes out.

They round where `layers/norms.py` rounds. The sum over a row runs in another order than torch's, which moves rms(x) by
a few units of float32; where x / rms(x) lies next to a boundary of BF16, the result differs by one step.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....moe import Choices
from ....moe.gpu.finalize import sum_choices
from ....quant.gpu.device import on_own_device
from ....quant.gpu.early import await_inputs, early
from ....quant.gpu.quantize import load_rows, row_tiles, write_fp8
from ..layers.norms import NormName


@triton.jit
def inverse_rms(x, share, eps):
    """float32 x [ROWS, COLS], zero beyond 1 / `share` columns -> float32 [ROWS, 1]."""
    return tl.rsqrt(tl.sum(x * x, axis=1) * share + eps)[:, None]


@triton.jit
def normalize(x, inverse, weight, KIND: tl.constexpr):
    """x times its rows' `inverse_rms`, times the weight: float32, values of BF16."""
    x = x * inverse
    if KIND == "rms":
        x = x.to(tl.bfloat16).to(tl.float32) * weight
    elif KIND == "rms_wide":
        x = x * weight
    else:
        tl.static_assert(KIND == "rms_offset")
        x = x * (1.0 + weight)
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _store_rows(x, out_ptr, rows, num_rows, K, BLOCK_K: tl.constexpr):
    cols = tl.arange(0, BLOCK_K)
    offset = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(out_ptr + offset, x.to(tl.bfloat16), mask=(rows < num_rows)[:, None] & (cols < K)[None, :])


@triton.jit
def _norm_kernel(
    x_ptr,
    y_ptr,
    place_ptr,
    choice_ptr,
    weight_ptr,
    static_ptr,
    sum_ptr,
    out_ptr,
    codes_ptr,
    token_ptr,
    num_rows,
    K,
    share,
    eps,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    TOP_K: tl.constexpr,
    PLACED: tl.constexpr,
    NORMED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    STATIC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program for every few rows. ADD: of x + y, which is kept; TOP_K: y is the sum of that many choices, or 0;
    NORMED: keep BF16; QUANTIZE: keep FP8 codes."""
    await_inputs(EARLY)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    x = load_rows(x_ptr, rows, num_rows, K, BLOCK_K, 1)
    if ADD:
        if TOP_K:
            y = sum_choices(y_ptr, place_ptr, choice_ptr, rows, cols, num_rows, K, TOP_K, PLACED).to(tl.float32)
        else:
            y = load_rows(y_ptr, rows, num_rows, K, BLOCK_K, 1)
        x = (x + y).to(tl.bfloat16).to(tl.float32)
        _store_rows(x, sum_ptr, rows, num_rows, K, BLOCK_K)
    weight = tl.load(weight_ptr + cols[None, :], mask=(cols < K)[None, :], other=0.0).to(tl.float32)
    x = normalize(x, inverse_rms(x, share, eps), weight, KIND)
    if NORMED:
        _store_rows(x, out_ptr, rows, num_rows, K, BLOCK_K)
    if QUANTIZE:
        write_fp8(x, rows, static_ptr, codes_ptr, token_ptr, num_rows, K, ROWS, BLOCK_K, STATIC)


@on_own_device
def rms_norm(x: Tensor, weight: Tensor, eps: float, kind: NormName) -> Tensor:
    """BF16 x [..., K], weight [K] -> BF16 [..., K]."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, weight, eps, kind, out=out)
    return out


@on_own_device
def add_rms_norm(x: Tensor, y: Tensor | Choices, weight: Tensor, eps: float, kind: NormName) -> tuple[Tensor, Tensor]:
    """BF16 x, y [..., K], weight [K] -> h = x + y and the norm of h, both BF16 [..., K].

    y may be the experts' choices for x [num_tokens, K]: they are summed on the way.
    """
    total, out = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch(x, y, weight, eps, kind, total=total, out=out)
    return total, out


@on_own_device
def rms_norm_quantize_fp8(
    x: Tensor, weight: Tensor, eps: float, kind: NormName, input_scale: Tensor | None = None, *, keep: bool = False
) -> tuple[Tensor | None, Tensor, Tensor]:
    """BF16 x [M, K], weight [K] -> the norm as BF16 [M, K] (None without `keep`), and as FP8.

    FP8 as `quantize_fp8` gives it from the BF16 norm: E4M3 codes [M, K], decode scale float32 [M], or `input_scale`.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if keep else None
    codes, token = _codes(x, input_scale)
    _launch(x, None, weight, eps, kind, out=out, codes=codes, token=token, static=input_scale)
    return out, codes, token


@on_own_device
def add_rms_norm_quantize_fp8(
    x: Tensor,
    y: Tensor | Choices,
    weight: Tensor,
    eps: float,
    kind: NormName,
    input_scale: Tensor | None = None,
    *,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """BF16 x, y [M, K] (or choices), weight [K] -> h = x + y as BF16, then the norm of h as `rms_norm_quantize_fp8`
    returns it."""
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty_like(total) if keep else None
    codes, token = _codes(x, input_scale)
    _launch(x, y, weight, eps, kind, total=total, out=out, codes=codes, token=token, static=input_scale)
    return total, out, codes, token


def _codes(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty(len(x), device=x.device) if input_scale is None else input_scale


def _launch(
    x: Tensor,
    y: Tensor | Choices | None,
    weight: Tensor,
    eps: float,
    kind: NormName,
    *,
    total: Tensor | None = None,
    out: Tensor | None = None,
    codes: Tensor | None = None,
    token: Tensor | None = None,
    static: Tensor | None = None,
) -> None:
    """What is not asked for gets x as its pointer, which the kernel leaves alone."""
    assert x.dtype == torch.bfloat16
    x, K = x.contiguous(), x.shape[-1]
    num_rows = x.numel() // K
    rows, block_k, warps = row_tiles(K, 512)
    if not num_rows:
        return
    values, weights, places = (y.values, y.weights, y.places) if isinstance(y, Choices) else (y, None, None)
    _norm_kernel[(-(-num_rows // rows),)](
        x,
        x if values is None else values.contiguous(),
        x if places is None else places,
        x if weights is None else weights,
        weight,
        x if static is None else static,
        x if total is None else total,
        x if out is None else out,
        x if codes is None else codes,
        x if token is None else token,
        num_rows,
        K,
        1 / K,
        eps,
        KIND=kind,
        ADD=y is not None,
        TOP_K=0 if weights is None else weights.shape[1],
        PLACED=places is not None,
        NORMED=out is not None,
        QUANTIZE=codes is not None,
        STATIC=static is not None,
        ROWS=rows,
        BLOCK_K=block_k,
        num_warps=warps if weights is None else min(16, 2 * warps),  # choices are many to load
        **early(x),
    )
