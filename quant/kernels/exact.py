"""`exact`: code x block scale packed as one exact product, global and token scales in the epilogue.

The product of an E2M1 code and an E4M3 scale has six significant bits, so BF16 holds it exactly and the GEMM sees
the very numbers of NVFP4 and FP8 arithmetic. Saves no memory: weights take BF16's room, on a CPU float32's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .. import numerics
from ..device import Capability
from ..scheme import FP8, NVFP4, Scheme, Stored, TensorSpec, WeightShape
from .activation import quantize_activation
from .gemm import batch_dependent, matmul_float32, product_dtype


class ExactKernel:
    """Any quantized scheme on any device: exact products, float32 sums and epilogue, one rounding of the result."""

    name: ClassVar[str] = "exact"

    def __init__(self, scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> None:
        assert isinstance(scheme, FP8 | NVFP4)
        self.scheme, self.shape, self.dtype = scheme, shape, dtype
        self.packed_dtype = product_dtype(dtype, capability)
        self.looks_at_scales = capability.sm is None

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        return None if isinstance(scheme, FP8 | NVFP4) else "computes FP8 and NVFP4 only"

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return batch_dependent(capability)

    def packed(self) -> dict[str, TensorSpec]:
        rows = TensorSpec(self.shape.dims(self.shape.num_rows), torch.float32)
        specs = {"weight": TensorSpec(self.shape.matrix, self.packed_dtype), "row_scale": rows}
        if self.scheme.activation == "static":
            specs["input_scale"] = TensorSpec(self.shape.dims(len(self.shape.rows)), torch.float32)
        return specs

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        if isinstance(self.scheme, FP8):
            return {"weight": numerics.decode_fp8(matrices["weight"], self.dtype)}
        return {"weight": numerics.nvfp4_products(matrices["weight"], matrices["weight_scale"], self.dtype)}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        packed = {"row_scale": self.scheme.row_scale(scales, self.shape).clone()}
        if self.scheme.activation == "static":
            packed["input_scale"] = scales["input_scale"].clone()
        return packed

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        input_scale = packed.get("input_scale")
        if input_scale is None or self._all_equal(input_scale):
            out = self._matmul(x, packed["weight"], packed["row_scale"], input_scale)
        else:  # shards of a foreign checkpoint with unequal input scales keep them
            parts = [self.shape.shard_slice(shard) for shard in range(len(self.shape.rows))]
            outs = [
                self._matmul(x, packed["weight"][part], packed["row_scale"][part], input_scale[shard : shard + 1])
                for shard, part in enumerate(parts)
            ]
            out = torch.cat(outs, dim=-1)
        return (out if bias is None else out.add_(bias)).to(self.dtype)

    def _all_equal(self, input_scale: Tensor) -> bool:
        """Whether one product serves all shards. To ask a GPU is to wait for it, and what a CUDA graph holds must stay
        right when a swap brings unequal scales: there, shards are multiplied one by one."""
        return len(input_scale) == 1 or (self.looks_at_scales and bool((input_scale == input_scale[0]).all()))

    def _matmul(self, x: Tensor, weight: Tensor, row_scale: Tensor, input_scale: Tensor | None) -> Tensor:
        """float32 [num_tokens, rows of weight]"""
        static = None if input_scale is None else input_scale[0]
        values, scale = quantize_activation(x, self.scheme, static, self.packed_dtype)
        out = matmul_float32(values, weight).mul_(row_scale)
        return out if scale is None else out.mul_(scale)
