"""Matrix products whose rows do not depend on how many rows there are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import Capability


def product_dtype(dtype: torch.dtype, capability: Capability) -> torch.dtype:
    """The dtype that weights are multiplied in: a CPU's float32 units outrun its BF16 ones, at twice the memory."""
    return torch.float32 if capability.sm is None else dtype


def matmul_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K] transposed -> float32 [M, N]; BF16 on a GPU, float32 on a CPU.

    On a CPU through oneDNN, which sums a row in one order whatever M >= 2 and the number of threads; MKL, which
    `F.linear` takes for float32, does not (a torch without oneDNN has only that). oneDNN compiles and keeps a kernel
    for every M it meets (a millisecond and 0.7 MB each), so rows come in few numbers: zeros fill up to the next of
    `padded_rows`.
    """
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return F.linear(x.float(), weight.float())
    rows = padded_rows(len(x))
    if rows == len(x):
        return _multiply(x.float(), weight.float())
    padded = x.new_empty(rows, x.shape[1], dtype=torch.float32)
    padded[: len(x)] = x
    padded[len(x) :] = 0
    return _multiply(padded, weight.float())[: len(x)]


def padded_rows(rows: int) -> int:
    """2, 4, 8, multiples of 16 up to 256, multiples of 128."""
    if rows <= 16:
        return max(2, 1 << (rows - 1).bit_length()) if rows else 0
    step = 16 if rows <= 256 else 128
    return -(-rows // step) * step


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias [N], in x's dtype; the weight in `product_dtype`."""
    if weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    out = matmul_float32(x, weight)
    return (out if bias is None else out.add_(bias)).to(x.dtype)
