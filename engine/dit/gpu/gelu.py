"""What the second linear of an MLP reads, in one launch: attention's output and gelu(mlp) side by side, or one of them.

    out = [attention | gelu(mlp)]      gelu(x) = x sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3)

(the tanh form, arXiv:1606.08415, with tanh(u) = 2 sigmoid(2 u) - 1). Float32, rounded to BF16 once; codes are those of
the rounded row.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....quant.gpu.device import on_own_device
from ....quant.gpu.quantize import fp8_codes, fp8_scale
from .activations import Activations
from .streams import Streams, find_row

WARP_COLS = 2048  # of a row, a warp: 64 a thread, two programs on a multiprocessor
LINEAR = tl.constexpr(-2.302208198144325)  # -2 sqrt(2 / pi) log2(e)
CUBIC = tl.constexpr(-0.1029432395800235)  # times 0.044715


@triton.jit
def _exp2(x, ASSEMBLY: tl.constexpr):
    """2^x, within 2 units in the last place; ASSEMBLY: without a way around for denormals."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def _reciprocal(x, ASSEMBLY: tl.constexpr):
    """1 / x, within a unit in the last place; 0 of infinity."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def _rounded(x, ASSEMBLY: tl.constexpr):
    """To values of BF16; ASSEMBLY: two in one instruction, where the compiler takes one at an eighth of the rate."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 both, low, high;
            cvt.rn.bf16x2.f32 both, $3, $2;
            shl.b32 low, both, 16; and.b32 high, both, 0xFFFF0000;
            mov.b32 $0, low; mov.b32 $1, high; }""",
            "=f,=f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _gelu(x, ASSEMBLY: tl.constexpr):
    power = _exp2(x * (LINEAR + CUBIC * (x * x)), ASSEMBLY)
    return _rounded(x * _reciprocal(1.0 + power, ASSEMBLY), ASSEMBLY)


@triton.jit
def _load(ptr, first, end, COLS: tl.constexpr):
    """float32 [1, COLS] from `first` on; zeros from `end` on."""
    cols = first + tl.arange(0, COLS)[None, :]
    return tl.load(ptr + cols, mask=cols < end, other=0.0).to(tl.float32)


@triton.jit
def _store(x, scale, out_ptr, codes_ptr, first, end, COLS: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr):
    cols = first + tl.arange(0, COLS)[None, :]
    if KEEP:
        tl.store(out_ptr + cols, x.to(tl.bfloat16), mask=cols < end)
    if QUANTIZE:
        tl.store(codes_ptr + cols, fp8_codes(x, scale), mask=cols < end)


@triton.jit
def _gelu_kernel(
    attention_ptr,
    mlp_ptr,
    out_ptr,
    codes_ptr,
    token_ptr,
    batch,
    text,
    image,
    width,
    inner,
    KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr,
    LEFT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """A program a row: `width` columns of attention (joint rows), `inner` of the MLP (rows of streams) in two tiles,
    so that few lanes idle where `inner` is no power of two."""
    row = tl.program_id(0)
    _, sample, position = find_row(row, batch, text, image)
    joint, K = (sample * (text + image) + position).to(tl.int64), width + inner
    out_ptr += row.to(tl.int64) * K
    codes_ptr += row.to(tl.int64) * K
    mlp_ptr += row.to(tl.int64) * inner
    amax = tl.zeros((1,), tl.float32)
    if LEFT:
        left = _load(attention_ptr + joint * width, 0, width, LEFT)
        amax = tl.maximum(amax, tl.max(tl.abs(left), axis=1), propagate_nan=tl.PropagateNan.ALL)
    if FIRST:
        first = _gelu(_load(mlp_ptr, 0, inner, FIRST), ASSEMBLY)
        amax = tl.maximum(amax, tl.max(tl.abs(first), axis=1), propagate_nan=tl.PropagateNan.ALL)
    if SECOND:
        second = _gelu(_load(mlp_ptr, FIRST, inner, SECOND), ASSEMBLY)
        amax = tl.maximum(amax, tl.max(tl.abs(second), axis=1), propagate_nan=tl.PropagateNan.ALL)
    scale = fp8_scale(amax)
    if QUANTIZE:
        tl.store(token_ptr + row + tl.arange(0, 1), scale)
    if LEFT:
        _store(left, scale, out_ptr, codes_ptr, 0, width, LEFT, KEEP, QUANTIZE)
    if FIRST:
        _store(first, scale, out_ptr, codes_ptr, width, K, FIRST, KEEP, QUANTIZE)
    if SECOND:
        _store(second, scale, out_ptr, codes_ptr, width + FIRST, K, SECOND, KEEP, QUANTIZE)


@on_own_device
def join_gelu(
    attention: Tensor, mlp: Tensor | None, streams: Streams, *, keep: bool = True, quantize: bool = False
) -> Activations:
    """BF16 attention [num_rows, width] (joint rows), mlp [num_rows, inner] (rows of `streams`; None: there is none) ->
    rows of `streams` [num_rows, width + inner], [attention | gelu(mlp)]: as BF16 (`keep`), as FP8 (`quantize`)."""
    return _launch(attention, mlp, streams, keep, quantize)


@on_own_device
def gelu(mlp: Tensor, streams: Streams, *, keep: bool = True, quantize: bool = False) -> Activations:
    """BF16 mlp [num_rows, inner] -> its GELU: as BF16 (`keep`), as FP8 (`quantize`)."""
    return _launch(None, mlp, streams, keep, quantize)


def _launch(attention: Tensor | None, mlp: Tensor | None, streams: Streams, keep: bool, quantize: bool) -> Activations:
    width, inner = (0 if part is None else part.shape[1] for part in (attention, mlp))
    num_rows, K = streams.num_rows, width + inner
    given = [part for part in (attention, mlp) if part is not None]
    x = given[0]
    assert all(part.is_contiguous() and len(part) == num_rows for part in given)
    out = x.new_empty(num_rows, K) if keep else None
    codes = x.new_empty(num_rows, K, dtype=torch.float8_e4m3fn) if quantize else None
    token = x.new_empty(num_rows, dtype=torch.float32) if quantize else None
    left, first, second = tiles(width, inner)
    _gelu_kernel[(num_rows,)](
        x, given[-1], x if out is None else out, x if codes is None else codes, x if token is None else token,
        streams.batch, streams.text, streams.image, width, inner, KEEP=keep, QUANTIZE=quantize,
        LEFT=left, FIRST=first, SECOND=second, ASSEMBLY=x.is_cuda,
        num_warps=min(16, max(1, _covering(left + first + second) // WARP_COLS)),
    )  # fmt: skip
    return Activations(out, codes, token)


def tiles(width: int, inner: int) -> tuple[int, int, int]:
    """Columns of the tile of attention and of the two of the MLP: powers of two that cover them, 0 where there is
    nothing."""
    first = 1 << inner.bit_length() - 1 if inner else 0
    rest = inner - first
    if rest > first // 2 or 0 < rest < 16:  # one tile is as small, or two are too small for a warp
        first, rest = 2 * first, 0
    return _covering(width), first, _covering(rest)


def _covering(size: int) -> int:
    """The next power of two; none for nothing."""
    return 1 << (size - 1).bit_length() if size else 0
