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
    `F.linear` takes for float32, does not.
    """
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return F.linear(x.float(), weight.float())
    rows = x.float() if len(x) != 1 else x.float().expand(2, -1)
    return torch.ops.mkldnn._linear_pointwise(rows, weight.float(), None, "none", [], "")[: len(x)]


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times weight [N, K] transposed, plus bias [N], in x's dtype; the weight in `product_dtype`."""
    if weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    out = matmul_float32(x, weight)
    return (out if bias is None else out.add_(bias)).to(x.dtype)
