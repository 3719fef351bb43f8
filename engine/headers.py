"""What the header of a safetensors file tells: no tensor is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct


class StoredTensor(Struct, frozen=True):
    """One tensor as a header tells it; `dtype` is safetensors' own name."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


def read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """8 bytes of length, then JSON; the file has been opened before by safetensors, which validates it."""
    with file.open("rb") as raw:
        header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, StoredTensor(entry["dtype"], tuple(entry["shape"]), end - start)
