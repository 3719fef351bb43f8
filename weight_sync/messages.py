"""Structs that cross a process border."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Phase = Literal["receive", "quantize", "prepare", "commit", "pause"]


class UpdateReport(Struct, frozen=True):
    """What one swap did.

    `seconds`: `receive` waits for and copies tensors, `quantize` turns BF16 into stored values, `prepare` packs them,
    `commit` copies the staged tensors onto the served ones; `pause` is the time in which nothing could be generated.
    `clipping`: slot -> share of activations that the previous version clipped, where its scales are static.
    `coverage` is the touched share of all slots; `bytes_in` counts the bytes that arrived.
    """

    version: str
    status: Literal["committed", "unchanged"]
    tensors: int
    bytes_in: int
    layers: int
    coverage: float
    seconds: dict[Phase, float]
    digest: str
    warnings: tuple[str, ...] = ()
    clipping: dict[str, float] = {}
