"""Which tensors the fused kernels of `engine/llm/gpu` take."""

from __future__ import annotations

import torch
from torch import Tensor

from ....quant.scheme import has_kernels


def has_fused_kernels(x: Tensor) -> bool:
    """Whether layers compute x in few launches, within a BF16 step of what torch gives."""
    return x.dtype == torch.bfloat16 and has_kernels(x)
