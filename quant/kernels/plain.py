"""`bf16`: unquantized weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..device import Capability
from ..scheme import Plain, Scheme, Stored, TensorSpec, WeightShape
from .gemm import batch_dependent, matmul, product_dtype


class PlainKernel:
    """Vectors in the engine's dtype, matrices in the one they are multiplied in; also norms, embeddings, biases."""

    name: ClassVar[str] = "bf16"

    def __init__(self, scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> None:
        assert isinstance(scheme, Plain)
        self.tensor = scheme.tensor
        self.shape = shape
        self.dtype = dtype if scheme.dtype == torch.bfloat16 else scheme.dtype
        if shape.cols is not None:
            self.dtype = product_dtype(self.dtype, capability)

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        return None if isinstance(scheme, Plain) else "computes unquantized weights only"

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return batch_dependent(capability)

    def packed(self) -> dict[str, TensorSpec]:
        return {self.tensor: TensorSpec(self.shape.matrix, self.dtype)}

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        return {self.tensor: matrices[self.tensor]}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        return {}

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        return matmul(x, packed["weight"], bias)

    def rows_of(self, packed: Stored, part: slice) -> dict[str, Tensor]:
        """What `apply` of a kernel for some of the rows reads: a view."""
        return {self.tensor: packed[self.tensor][part]}
