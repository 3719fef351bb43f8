"""Rotary position embeddings: frequencies, angles of the tokens at hand, rotation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from msgspec import Struct
from torch import Tensor

Rotary = tuple[Tensor, Tensor]  # cos and sin [num_tokens, 1, rotary_dim]
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rope(Struct, frozen=True):
    """`inv_freq` float32 [rotary_dim / 2]; `factor` multiplies cos and sin.

    A pair that turns together lies half a rotary_dim apart, or side by side if `interleaved` (DeepSeek).
    """

    inv_freq: Tensor
    factor: float = 1.0
    interleaved: bool = False

    @property
    def dim(self) -> int:
        return 2 * len(self.inv_freq)


def rotary(inv_freq: Tensor, factor: float, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """cos and sin [num_tokens, 1, rotary_dim] of positions int64 [num_tokens], rounded to `dtype`."""
    angles = positions[:, None].float() * inv_freq
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def select_rotate(rope: Rope, head_dim: int) -> Rotate:
    """The rotation of heads of this size."""
    if rope.interleaved:
        assert rope.dim == head_dim
        return rotate_interleaved
    return rotate if rope.dim == head_dim else rotate_first


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [num_tokens, heads, rotary_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [num_tokens, heads, head_dim]: the first rotary_dim turn, the others stay."""
    turning, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    return torch.cat([rotate(turning, cos, sin), still], dim=-1)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [num_tokens, heads, rotary_dim], pairs side by side: x0 y0 x1 y1 ... -> x0 x1 ... y0 y1 ...

    q and k come out in the same new order, which scores do not see.
    """
    return rotate(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), cos, sin)
