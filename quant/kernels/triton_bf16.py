"""`triton_bf16`: unquantized weights on Hopper, a row in the same bits with any number of others."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..device import Capability
from ..scheme import BF16, Scheme, Stored, WeightShape
from .gemm import no_invariant_matmul
from .plain import PlainKernel


class TritonBF16Kernel(PlainKernel):
    """Packed as for `bf16`."""

    name: ClassVar[str] = "triton_bf16"

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        return no_invariant_matmul(capability, dtype) if scheme == BF16 else "computes BF16 weights only"

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return None

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        from ..gpu.bf16_gemm import bf16_matmul

        return bf16_matmul(x, packed["weight"], bias)
