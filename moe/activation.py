"""Gated activations: gate and up side by side -> what the down projection takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

ActivationName = Literal["silu", "gelu_tanh", "clamped_swiglu"]
Activate = Callable[[Tensor], Tensor]  # [..., 2 * intermediate_size] -> [..., intermediate_size]


def gated_activation(name: ActivationName, limit: float = 7.0, alpha: float = 1.702) -> Activate:
    """The function of this name; `limit` and `alpha` are those of `clamped_swiglu`."""
    match name:
        case "silu":
            return silu_and_mul
        case "gelu_tanh":
            return gelu_tanh_and_mul
        case "clamped_swiglu":
            return partial(clamped_swiglu, limit=limit, alpha=alpha)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def clamped_swiglu(gate_up: Tensor, *, limit: float, alpha: float) -> Tensor:
    """g * sigmoid(alpha g) * (u + 1), with g at most `limit` and u between -`limit` and `limit` (gpt-oss)."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * (alpha * gate).sigmoid() * (up + 1)
