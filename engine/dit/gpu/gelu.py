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
from ....quant.gpu.quantize import write_fp8
from .activations import Activations
from .streams import Streams, find_row

TWICE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def gelu_tanh(x):
    return x / (1.0 + tl.exp(-TWICE * (x + 0.044715 * x * x * x)))


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
    num_rows,
    width,
    inner,
    KEEP: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program a row of `width` columns of attention (joint rows) and `inner` columns of the MLP (rows of streams)."""
    row, cols = tl.program_id(0), tl.arange(0, BLOCK_K)[None, :]
    _, sample, position = find_row(row, batch, text, image)
    joint, K = (sample * (text + image) + position).to(tl.int64), width + inner
    left = tl.load(attention_ptr + joint * width + cols, mask=cols < width, other=0.0).to(tl.float32)
    inside = (cols >= width) & (cols < K)
    right = tl.load(mlp_ptr + row.to(tl.int64) * inner + (cols - width), mask=inside, other=0.0).to(tl.float32)
    out = (left + gelu_tanh(right)).to(tl.bfloat16)  # one of them is zero
    if KEEP:
        tl.store(out_ptr + row.to(tl.int64) * K + cols, out, mask=cols < K)
    if QUANTIZE:
        rows = row + tl.arange(0, 1)
        write_fp8(out.to(tl.float32), rows, token_ptr, codes_ptr, token_ptr, num_rows, K, 1, BLOCK_K, 0)


@on_own_device
def join_gelu(
    like: Tensor,
    streams: Streams,
    attention: Tensor | None = None,
    mlp: Tensor | None = None,
    *,
    keep: bool = True,
    quantize: bool = False,
) -> Activations:
    """BF16 attention [num_rows, width] (joint rows) and mlp [num_rows, inner] (rows of `streams`) -> rows of `streams`,
    [num_rows, width + inner]: [attention | gelu(mlp)]; as BF16 (`keep`), as FP8 (`quantize`). `like` gives the device.
    """
    width, inner = (0 if part is None else part.shape[1] for part in (attention, mlp))
    num_rows, K = streams.num_rows, width + inner
    given = [part for part in (attention, mlp) if part is not None]
    assert all(part.is_contiguous() and len(part) == num_rows for part in given)
    out = like.new_empty(num_rows, K) if keep else None
    codes = like.new_empty(num_rows, K, dtype=torch.float8_e4m3fn) if quantize else None
    token = like.new_empty(num_rows, dtype=torch.float32) if quantize else None
    block_k = max(16, triton.next_power_of_2(K))
    _gelu_kernel[(num_rows,)](
        given[0], given[-1], like if out is None else out, like if codes is None else codes,
        like if token is None else token, streams.batch, streams.text, streams.image, num_rows, width, inner,
        KEEP=keep, QUANTIZE=quantize, BLOCK_K=block_k, num_warps=min(16, max(1, block_k // 1024)),
    )  # fmt: skip
    return Activations(out, codes, token)
