"""Which tensors the fused kernels of `engine/llm/gpu` take."""

from __future__ import annotations

import torch
from torch import Tensor

from ....quant.scheme import has_kernels


def has_fused_kernels(x: Tensor) -> bool:
    """Whether layers compute x in few launches: torch's roundings, but sums in another order (see `gpu/norms.py`)."""
    return x.dtype == torch.bfloat16 and has_kernels(x)
