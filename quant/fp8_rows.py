"""`FP8Rows`: activations quantized by who made them, so that a product need not do it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from torch import Tensor

from .errors import UnsupportedError

Reads = Literal["values", "codes", "both"]  # what a layer reads of its input: BF16, FP8 per token, or both


class FP8Rows(Struct, frozen=True):
    """FP8 per token, bit for bit as a quantizer gives it from BF16 `values`; those are kept where somebody reads them.

    codes E4M3 [num_tokens, K], decode scales float32 [num_tokens], values BF16 [num_tokens, K] or None.
    """

    codes: Tensor
    scale: Tensor
    values: Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes)


def values_of(x: Tensor | FP8Rows) -> Tensor:
    """The BF16 rows; raises `UnsupportedError` where only codes were kept."""
    if not isinstance(x, FP8Rows):
        return x
    if x.values is None:
        raise UnsupportedError(
            "BF16 values were asked for, but only FP8 codes were kept",
            ["a layer that reads values says so: `reads` is 'values' or 'both'"],
        )
    return x.values
