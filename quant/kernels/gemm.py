"""Matrix products whose rows do not depend on how many rows there are."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import Capability
from ..errors import UnsupportedError


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


def batch_dependent(capability: Capability) -> str | None:
    """Why a row of these products may have other bits where there are more rows, or None."""
    if capability.sm is not None:
        return "it multiplies through a library that chooses how to sum by the number of rows"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN, and MKL sums a row as the number of rows and threads suggests"
    return None


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias [N], in x's dtype; the weight in `product_dtype`."""
    if weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    out = matmul_float32(x, weight)
    return (out if bias is None else out.add_(bias)).to(x.dtype)


class Matmul(Protocol):
    """x [M, K] times weight [N, K] transposed, plus bias [N], in x's dtype."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Tensor: ...


def select_matmul(capability: Capability, dtype: torch.dtype, *, batch_invariant: bool) -> Matmul:
    """`matmul`, or with `batch_invariant` a product of this dtype whose rows do not depend on how many there are."""
    reason = batch_dependent(capability) if batch_invariant else None
    if reason is None:
        return matmul
    reason = no_invariant_matmul(capability, dtype)
    if reason is not None:
        raise UnsupportedError(f"batch_invariant=True for products in {dtype} on {capability}", [reason])
    from ..gpu.bf16_gemm import bf16_matmul

    return bf16_matmul


def no_invariant_matmul(capability: Capability, dtype: torch.dtype) -> str | None:
    """Why no kernel of our own multiplies rows independently of each other here, or None."""
    if capability.sm != 90:
        return f"its tiles were checked on sm90, this is {capability}"
    if "triton" not in capability.libraries:
        return "triton is not installed"
    return None if dtype == torch.bfloat16 else f"computes in bfloat16, not {dtype}"
