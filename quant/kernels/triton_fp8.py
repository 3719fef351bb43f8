"""`triton_fp8`: FP8 x FP8 on Hopper, by kernels of our own for few and for more tokens, else by `torch._scaled_mm`."""

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
        from ..gpu.fp8_middle import middle_tile, middle_tokens

        operands = rows.codes, rows.scale, packed["weight"], packed["row_scale"][0], self.shape.num_rows
        if len(rows) <= most_tokens(*self.padded):
            return few_tokens(*operands, bias, out)
        if (tile := middle_tile(*self.padded, len(rows))) is not None:
            return middle_tokens(*operands, tile, bias, out)
        return super().multiply(rows, packed, bias, out, fast=fast)
