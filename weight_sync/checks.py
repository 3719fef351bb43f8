"""What tensors are refused for, whoever sends them."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import NonFiniteError, ShapeError


def check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    """Raise `ShapeError` unless the shape is the expected one; one number may have any shape."""
    if tuple(value.shape) != expected and not (value.numel() == 1 and expected == (1,)):
        raise ShapeError(f"{name}: expected shape {list(expected)}, got {list(value.shape)}")


def is_finite(value: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity (E4M3 has NaN only); codes always are."""
    if value.dtype == torch.uint8 or not value.numel():
        return True
    if value.dtype == torch.float8_e4m3fn:
        return bool((value.view(torch.uint8) & 0x7F).amax() < 0x7F)
    return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def check_finite(name: str, value: Tensor) -> None:
    """Raise `NonFiniteError` if a float tensor holds NaN or infinity."""
    if not is_finite(value):
        raise NonFiniteError(f"{name} holds NaN or infinity")


def check_scale(name: str, value: Tensor, *, zero: bool = False) -> None:
    """Raise `NonFiniteError` unless a scale is finite and positive (or zero, where that has a meaning)."""
    check_finite(name, value)
    if bool((value < 0).any()) or not zero and bool((value == 0).any()):
        raise NonFiniteError(f"{name} must be positive, got {value.min().item()}")
