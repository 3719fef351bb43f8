"""What tensors are refused for, whoever sends them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import NonFiniteError, ShapeError


def check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    """Raise `ShapeError` unless the shape is the expected one; one number may have any shape."""
    if tuple(value.shape) != expected and not (value.numel() == 1 and expected == (1,)):
        raise ShapeError(f"{name}: expected shape {list(expected)}, got {list(value.shape)}")


def is_finite(value: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity (E4M3 has NaN only); codes always are."""
    flag = finite_flag(value)
    return flag is None or bool(flag)


def finite_flag(value: Tensor) -> Tensor | None:
    """The same as a bool tensor that a GPU may still be computing; None: codes, or nothing at all."""
    if value.dtype == torch.uint8 or not value.numel():
        return None
    if value.dtype == torch.float8_e4m3fn:
        return (value.view(torch.uint8) & 0x7F).amax() < 0x7F
    return torch.isfinite(torch.stack(torch.aminmax(value))).all()


def check_finite(name: str, value: Tensor) -> None:
    """Raise `NonFiniteError` if a float tensor holds NaN or infinity."""
    if not is_finite(value):
        raise NonFiniteError(f"{name} holds NaN or infinity")


def check_scale(name: str, value: Tensor, *, zero: bool = False) -> None:
    """Raise `NonFiniteError` unless a scale is finite and positive (or zero, where that has a meaning)."""
    check_finite(name, value)
    if bool((value < 0).any()) or not zero and bool((value == 0).any()):
        raise NonFiniteError(f"{name} must be positive, got {value.min().item()}")


class FiniteChecks:
    """Flags that a GPU is still computing, looked at all at once: a look waits, and a wait a tensor would be slow.

    Until then what they speak of is held, at the most `limit` bytes of buffers.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._flags: list[Tensor] = []
        self._values: list[Sequence[tuple[str, Tensor]]] = []
        self._freed: list[Callable[[], None]] = []

    def add(
        self, flags: Sequence[Tensor], values: Sequence[tuple[str, Tensor]], num_bytes: int, free: Callable[[], None]
    ) -> None:
        """All `values` are finite if every one of `flags` is true; `free` is called once that is known."""
        self._flags += flags
        self._values += [values] * len(flags)
        self._freed.append(free)
        self._held += num_bytes
        if self._held > self.limit:
            self.look()

    def look(self) -> None:
        """Raise `NonFiniteError` that names what is not finite, or let go of everything."""
        flags, values, freed = self._flags, self._values, self._freed
        self._flags, self._values, self._freed, self._held = [], [], [], 0
        told = torch.stack(flags).tolist() if flags else []
        for suspects in (v for finite, v in zip(told, values, strict=True) if not finite):
            for name, value in suspects:
                check_finite(name, value)
            raise NonFiniteError(f"one of these holds NaN or infinity: {', '.join(name for name, _ in suspects)}")
        for free in freed:
            free()
