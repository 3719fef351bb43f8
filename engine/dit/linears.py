"""`Linears`: what computes one linear of a model, or siblings together."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from torch import Tensor

from ...quant import SiblingLinears


class Linears(Struct, frozen=True):
    """`served`: as they are stored; `twin`: the BF16 copy of `dual`; `biases`: served, one a linear."""

    served: SiblingLinears
    twin: SiblingLinears | None
    biases: Sequence[Tensor | None]

    def at(self, precision: str) -> SiblingLinears:
        """What computes them in "quantized" or in "bf16"."""
        return self.twin if precision == "bf16" and self.twin is not None else self.served
