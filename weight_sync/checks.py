"""What tensors are refused for, whoever sends them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

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
        return bool(_e4m3_is_finite(value))
    return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def _e4m3_is_finite(value: Tensor) -> Tensor:
    return (value.view(torch.uint8) & 0x7F).amax() < 0x7F


def check_finite(name: str, value: Tensor) -> None:
    """Raise `NonFiniteError` if a float tensor holds NaN or infinity."""
    if not is_finite(value):
        raise NonFiniteError(f"{name} holds NaN or infinity")


def check_scale(name: str, value: Tensor, *, zero: bool = False) -> None:
    """Raise `NonFiniteError` unless a scale is finite and positive (or zero, where that has a meaning)."""
    check_finite(name, value)
    if bool((value < 0).any()) or not zero and bool((value == 0).any()):
        raise NonFiniteError(f"{name} must be positive, got {value.min().item()}")


def are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """`is_finite` of each, in few calls and with one wait."""
    finite = [True] * len(tensors)
    places, amax = _largest(tensors)
    for i, value in zip(places, amax.tolist(), strict=True):
        finite[i] = math.isfinite(value)
    return finite


def _largest(tensors: Sequence[Tensor]) -> tuple[list[int], Tensor]:
    """Which of these may be not finite, and of each of them a float32 that is infinite or NaN if it is not."""
    places, amax = list[int](), list[Tensor]()
    for dtype in {t.dtype for t in tensors} - {torch.uint8}:
        at = [i for i, t in enumerate(tensors) if t.dtype == dtype and t.numel()]
        if not at:
            continue
        if dtype == torch.float8_e4m3fn:
            found = [torch.where(_e4m3_is_finite(tensors[i]), 0.0, torch.inf) for i in at]
        else:
            found = torch._foreach_norm([tensors[i] for i in at], torch.inf)  # pyright: ignore[reportPrivateImportUsage]
        places += at
        amax.append(torch.stack(found).float())
    return places, torch.cat(amax) if amax else torch.empty(0)


Suspect = tuple[str, Tensor | None]  # a name, and what came under it, unless that is the sender's again


class FiniteChecks:
    """Tensors that a GPU looks at all at once: asking it waits, and a wait a tensor would be slow.

    Until then what they speak of is held, at the most `limit` bytes of buffers.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._telling: list[Tensor] = []
        self._values: list[Sequence[Suspect]] = []
        self._told: list[tuple[Tensor, list[Sequence[Suspect]]]] = []
        self._freed: list[Callable[[], None]] = []

    def add(
        self, telling: Sequence[Tensor], values: Sequence[Suspect], num_bytes: int, free: Callable[[], None]
    ) -> None:
        """All `values` are finite if every one of `telling` is; `free` is called once that is known."""
        self._telling += telling
        self._values += [values] * len(telling)
        self._freed.append(free)
        self._held += num_bytes
        if self._held > self.limit:
            self.look()

    def ask(self) -> None:
        """Launch what will tell: from then on `telling` may be overwritten."""
        places, amax = _largest(self._telling)
        if places:
            self._told.append((amax, [self._values[i] for i in places]))
        self._telling, self._values = [], []

    def look(self) -> None:
        """Wait; raise `NonFiniteError` that names what is not finite, or let go of everything."""
        self.ask()
        told, freed = self._told, self._freed
        self._told, self._freed, self._held = [], [], 0
        values = [one for _, several in told for one in several]
        amax = torch.cat([amax for amax, _ in told]).tolist() if told else []
        for suspects in (one for one, value in zip(values, amax, strict=True) if not math.isfinite(value)):
            raise_not_finite(suspects)
        for free in freed:
            free()


def raise_not_finite(suspects: Sequence[Suspect]) -> NoReturn:
    """`NonFiniteError` that names which of these it is, where that can still be seen."""
    for name, value in suspects:
        if value is not None:
            check_finite(name, value)
    raise NonFiniteError(f"NaN or infinity in {' or '.join(name for name, _ in suspects)}")
