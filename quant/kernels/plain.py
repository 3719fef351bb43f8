"""`bf16`: unquantized weights through torch's own matmul."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import Capability
from ..scheme import Plain, Scheme, Stored, TensorSpec, WeightShape


class PlainKernel:
    """Weights in the engine's dtype; also how norms, embeddings and biases are packed."""

    name: ClassVar[str] = "bf16"

    def __init__(self, scheme: Scheme, shape: WeightShape, dtype: torch.dtype) -> None:
        assert isinstance(scheme, Plain)
        self.tensor = scheme.tensor
        self.shape = shape
        self.dtype = dtype if scheme.dtype == torch.bfloat16 else scheme.dtype

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        return None if isinstance(scheme, Plain) else "computes unquantized weights only"

    def packed(self) -> dict[str, TensorSpec]:
        return {self.tensor: TensorSpec(self.shape.matrix, self.dtype)}

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        return {self.tensor: matrices[self.tensor].to(self.dtype)}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        return {}

    def apply(self, x: Tensor, packed: Stored) -> Tensor:
        return F.linear(x, packed["weight"])
