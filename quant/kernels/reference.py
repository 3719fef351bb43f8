"""`reference`: dequantize to float32, fake-quantize activations, multiply in float32. Slow, plain, for tests."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..device import Capability
from ..scheme import FP8, NVFP4, Scheme, Stored, TensorSpec, WeightShape
from .activation import quantize_activation
from .gemm import batch_dependent, matmul_float32


class ReferenceKernel:
    """Keeps the stored tensors as they are; what every other kernel is held against."""

    name: ClassVar[str] = "reference"

    def __init__(self, scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> None:
        self.scheme, self.shape, self.dtype = scheme, shape, dtype

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        return None if isinstance(scheme, FP8 | NVFP4) else "computes FP8 and NVFP4 only"

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return batch_dependent(capability)

    def packed(self) -> dict[str, TensorSpec]:
        return {**self.scheme.matrices(self.shape), **self.scheme.scales(self.shape)}

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        return {name: matrices[name].clone() for name in self.scheme.matrices(self.shape)}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        return {name: scales[name].clone() for name in self.scheme.scales(self.shape)}

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        weight = self.scheme.dequantize(packed, self.shape.unit)
        shards = weight.split(self.shape.rows)
        scales = packed.get("input_scale", [None] * len(shards))
        outs = [matmul_float32(self._fake_quant(x, scale), shard) for shard, scale in zip(shards, scales, strict=True)]
        out = torch.cat(outs, dim=-1)
        return (out if bias is None else out.add_(bias)).to(self.dtype)

    def _fake_quant(self, x: Tensor, input_scale: Tensor | None) -> Tensor:
        values, scale = quantize_activation(x, self.scheme, input_scale, torch.float32)
        return values if scale is None else values * scale
