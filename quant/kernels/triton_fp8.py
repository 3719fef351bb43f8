"""`triton_fp8`: FP8 x FP8 on Hopper, by a kernel of our own for few tokens and by `torch._scaled_mm` for more."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..device import Capability
from ..fp8_rows import FP8Rows
from ..scheme import FP8, Scheme, Stored, WeightShape
from .torch_fp8 import TorchFP8Kernel


class TritonFP8Kernel(TorchFP8Kernel):
    """Packed as for `torch_fp8`. A row's result depends on no other row as long as their number takes the same road."""

    name: ClassVar[str] = "triton_fp8"

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        if not isinstance(scheme, FP8):
            return "computes FP8 only"
        if capability.sm != 90:
            return f"its tiles are for sm90, this is {capability}"
        if "triton" not in capability.libraries:
            return "triton is not installed"
        if dtype != torch.bfloat16:
            return f"gives BF16 results, not {dtype}"
        return TorchFP8Kernel.unsupported(scheme, shape, dtype, capability)

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return "it sums few tokens in another order than many; torch_fp8 does not"

    def multiply(
        self,
        rows: FP8Rows,
        packed: Stored,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        *,
        fast: bool = False,
    ) -> Tensor:
        from ..gpu.fp8_gemm import few_tokens, most_tokens

        if len(rows) > most_tokens(*self.padded):
            return super().multiply(rows, packed, bias, out, fast=fast)
        row_scale, num_rows = packed["row_scale"][0], self.shape.num_rows
        return few_tokens(rows.codes, rows.scale, packed["weight"], row_scale, num_rows, bias, out)
