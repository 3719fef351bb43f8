"""RMS norms, which differ in where they round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from msgspec import Struct
from torch import Tensor

from ....moe import Choices, summed
from ....quant import FP8Rows, Reads
from .fused import has_fused_kernels

NormName = Literal["rms", "rms_wide", "rms_offset"]


class Norm(Struct, frozen=True):
    """x [..., K], weight [K] -> [..., K]."""

    name: NormName
    eps: float

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if has_fused_kernels(x):
            from ..gpu.norms import rms_norm

            return rms_norm(x, weight, self.eps, self.name)
        return NORMS[self.name](x, weight, self.eps)

    def of_sum(
        self, x: Tensor, y: Tensor | Choices | None, weight: Tensor, reads: Reads = "values"
    ) -> tuple[Tensor, Tensor | FP8Rows]:
        """x + y (None: nothing) and its norm: with the codes that `reads` asks for, where fused kernels make them."""
        if not has_fused_kernels(x):
            x = x if y is None else x + summed(y)
            return x, self(x, weight)
        if reads != "values":
            return self._with_codes(x, y, weight, reads)
        if y is None:
            return x, self(x, weight)
        from ..gpu.norms import add_rms_norm

        return add_rms_norm(x, y, weight, self.eps, self.name)

    def _with_codes(
        self, x: Tensor, y: Tensor | Choices | None, weight: Tensor, reads: Reads
    ) -> tuple[Tensor, FP8Rows]:
        from ..gpu.norms import add_rms_norm_quantize_fp8, rms_norm_quantize_fp8

        keep = reads == "both"
        if y is None:
            values, codes, scale = rms_norm_quantize_fp8(x, weight, self.eps, self.name, keep=keep)
        else:
            x, values, codes, scale = add_rms_norm_quantize_fp8(x, y, weight, self.eps, self.name, keep=keep)
        return x, FP8Rows(codes, scale, values)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight: float32, rounded before the product (Llama)."""
    return _normalized(x, eps).to(x.dtype) * weight


def rms_norm_wide(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight: float32, rounded after the product (gpt-oss)."""
    return (_normalized(x, eps) * weight.float()).to(x.dtype)


def rms_norm_offset(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight): float32, rounded after the product (Gemma)."""
    return (_normalized(x, eps) * (1 + weight.float())).to(x.dtype)


def _normalized(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


NORMS: dict[NormName, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rms": rms_norm,
    "rms_wide": rms_norm_wide,
    "rms_offset": rms_norm_offset,
}
