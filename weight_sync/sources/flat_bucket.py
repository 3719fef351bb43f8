"""A bucket as many trainers send it: the bytes of many tensors, one after the other, in one uint8 tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from msgspec import Struct
from torch import Tensor

from ..errors import ShapeError


class FlatEntry(Struct, frozen=True):
    """One tensor of a flat bucket; `start` in bytes; `dtype` is torch's name, e.g. "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class FlatBucketSource:
    """Yields the tensors of a flat bucket. Any alignment: odd byte counts before wider dtypes are copied out."""

    def __init__(self, flat: Tensor, entries: Sequence[FlatEntry]) -> None:
        self.flat, self.entries = flat, entries

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for entry in self.entries:
            yield entry.name, self._tensor(entry)

    def _tensor(self, entry: FlatEntry) -> Tensor:
        dtype = getattr(torch, entry.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ShapeError(f"{entry.name}: {entry.dtype!r} is no torch dtype")
        end = entry.start + prod(entry.shape) * dtype.itemsize
        if entry.start < 0 or end > self.flat.numel():
            raise ShapeError(
                f"{entry.name}: bytes {entry.start}..{end} lie outside a bucket of {self.flat.numel()} bytes"
            )
        raw = self.flat[entry.start : end]
        aligned = (self.flat.storage_offset() + entry.start) % dtype.itemsize == 0
        return (raw if aligned else raw.clone()).view(dtype).view(entry.shape)
