"""RMS norms, which differ in where they round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

NormName = Literal["rms", "rms_wide", "rms_offset"]
Norm = Callable[[Tensor, Tensor, float], Tensor]


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


NORMS: dict[NormName, Norm] = {"rms": rms_norm, "rms_wide": rms_norm_wide, "rms_offset": rms_norm_offset}
